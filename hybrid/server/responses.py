"""OpenAI's `POST /v1/responses`, without a memory: a translation of a chat. Nothing is stored."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from hybrid.generation import GenerationStats
from hybrid.server.answer import Delta, deltas_of
from hybrid.server.blocks import Block, BlockEvent, Blocks
from hybrid.server.bodies import ResponsesBody
from hybrid.server.errors import as_api_error
from hybrid.server.openai import chat_logprobs
from hybrid.server.protocols import ServingEngine
from hybrid.server.responses_input import wanted_of
from hybrid.server.service import Service
from hybrid.server.token_text import TokenTexts
from hybrid.server.wire import event, json_response, read_body, stream, while_connected


async def responses(service: Service, request: Request) -> Response:
    """Answer a conversation, in the form of OpenAI's responses."""
    body = await read_body(request, ResponsesBody)
    engine = service.ready()
    wanted = await asyncio.to_thread(wanted_of, engine, body)
    deltas, made = deltas_of(engine, wanted), _Made(engine, body)
    if body.stream:
        return await stream(request, _events(service, made, deltas), service.settings.patience)
    async with while_connected(request.receive), aclosing(deltas):
        async for delta in deltas:
            made.blocks.add(delta)
    return json_response(made.response())


class _Made:
    """The response so far, and the events that tell of it."""

    def __init__(self, engine: ServingEngine, body: ResponsesBody) -> None:
        self.blocks, self._body, self._engine = Blocks(), body, engine
        self._texts, self._created, self._id = TokenTexts(engine.codec), int(time.time()), f"resp_{uuid.uuid4().hex}"
        self._items = uuid.uuid4().hex
        self._number = -1

    def response(self, error: str | None = None) -> dict[str, Any]:
        """As a whole: complete, incomplete where it reached its limit, failed with an `error`, or in progress."""
        last = self.blocks.last
        finish = last.finish if last else None
        status = "in_progress" if finish is None else "incomplete" if finish == "length" else "completed"
        status = "failed" if error else status
        return _asked(self._body, self._engine) | {
            "id": self._id,
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(at, block) for at, block in enumerate(self.blocks.blocks)],
            "error": {"code": "server_error", "message": error} if error else None,
            "usage": _usage(last.stats) if last and finish else None,
        }

    def event(self, kind: str, **content: Any) -> bytes:
        """The next event, numbered."""
        self._number += 1
        name = f"response.{kind}"
        return event({"type": name, "sequence_number": self._number} | content, name)

    def grow(self, delta: Delta) -> Iterator[bytes]:
        """The events of one more token."""
        if self.blocks.last is None:
            for kind in ("created", "in_progress"):
                yield self.event(kind, response=self.response())
        for each in self.blocks.add(delta):
            yield from self._call_events(each) if each.block.name is not None else self._text_events(each)

    def _call_events(self, each: BlockEvent) -> Iterator[bytes]:
        item = self._item(each.index, each.block, each.kind == "end")
        place = {"item_id": item["id"], "output_index": each.index}
        if each.kind == "begin":
            yield self.event("output_item.added", output_index=each.index, item=item | {"arguments": ""})
        elif each.kind == "grow":
            yield self.event("function_call_arguments.delta", **place, delta=each.text)
        else:
            done = {"name": each.block.name, "arguments": each.block.text}
            yield self.event("function_call_arguments.done", **place, **done)
            yield self.event("output_item.done", output_index=each.index, item=item)

    def _text_events(self, each: BlockEvent) -> Iterator[bytes]:
        item = self._item(each.index, each.block, each.kind == "end")
        place = {"item_id": item["id"], "output_index": each.index, "content_index": 0}
        (part,) = item["content"]
        if each.kind == "begin":
            yield self.event("output_item.added", output_index=each.index, item=item | {"content": []})
            yield self.event("content_part.added", **place, part=part | {"text": "", "logprobs": []})
        elif each.kind == "grow":
            logprobs = chat_logprobs(each.logprobs, self._texts)["content"]
            yield self.event("output_text.delta", **place, delta=each.text, logprobs=logprobs)
        else:
            yield self.event("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            yield self.event("content_part.done", **place, part=part)
            yield self.event("output_item.done", output_index=each.index, item=item)

    def _item(self, index: int, block: Block, ended: bool = True) -> dict[str, Any]:
        status = "completed" if ended else "in_progress"
        if block.name is not None:
            call = {"id": f"fc_{self._items}{index}", "type": "function_call", "status": status, "call_id": block.id}
            return call | {"name": block.name, "arguments": block.text}
        logprobs = chat_logprobs(block.logprobs, self._texts)["content"]
        content = [{"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}]
        item = {"id": f"msg_{self._items}{index}", "type": "message", "status": status, "role": "assistant"}
        return item | {"content": content}


async def _events(service: Service, made: _Made, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                for each in made.grow(delta):
                    yield each
    except Exception as error:
        if made.blocks.last is None:  # nothing was sent: the answer can have a status of its own
            raise
        said = as_api_error(service.broken(error))
        yield made.event("failed", response=made.response(said.message))
        return
    whole = made.response()
    yield made.event(whole["status"], response=whole)


def _usage(stats: GenerationStats) -> dict[str, Any]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens},
        "output_tokens": stats.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }


def _asked(body: ResponsesBody, engine: ServingEngine) -> dict[str, Any]:
    """What a response repeats of its request, and what is always so here."""
    settings = engine.settings
    form = body.text.format if body.text and body.text.format else {"type": "text"}
    if form.get("type") == "json_schema":
        form = {"description": None, "strict": False, "name": "", **form}
    unstrict = {"description": None, "parameters": None, "strict": False}
    return {
        "object": "response",
        "model": engine.name,
        "previous_response_id": None,
        "instructions": body.instructions,
        "tools": [unstrict | tool for tool in body.tools or ()],
        "tool_choice": body.tool_choice or "auto",
        "truncation": "disabled",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": form},
        "temperature": settings.temperature if body.temperature is None else body.temperature,
        "top_p": settings.top_p if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "top_logprobs": body.top_logprobs or 0,
        "reasoning": {"effort": None, "summary": None},
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }
