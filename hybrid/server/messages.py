"""Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`: translations of a chat."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from hybrid.generation import GenerationStats
from hybrid.server.answer import Delta, Wanted, deltas_of
from hybrid.server.blocks import Block, BlockEvent, Blocks
from hybrid.server.bodies import CountBody, MessagesBody
from hybrid.server.errors import ApiError, as_api_error, error_body
from hybrid.server.protocols import ServingEngine
from hybrid.server.sampling import settings_of
from hybrid.server.service import Service
from hybrid.server.tools import Tool, Toolbox, encode_chat
from hybrid.server.wire import event, json_response, read_body, stream, while_connected

_PATH = "/v1/messages"


async def messages(service: Service, request: Request) -> Response:
    """Answer a conversation, in Anthropic's form."""
    body = await read_body(request, MessagesBody)
    engine = service.ready()
    wanted = await asyncio.to_thread(_wanted, engine, body)
    deltas = deltas_of(engine, wanted)
    if body.stream:
        return await stream(request, _events(service, wanted, deltas), service.settings.patience)
    blocks = Blocks()
    async with while_connected(request.receive), aclosing(deltas):
        async for delta in deltas:
            blocks.add(delta)
    assert blocks.last is not None
    content = [_block(block) for block in blocks.blocks]
    return json_response(
        _head(engine) | {"content": content} | _stop(blocks.last) | {"usage": _usage(blocks.last.stats)}
    )


async def count_tokens(service: Service, request: Request) -> Response:
    """The tokens of a conversation's prompt."""
    body = await read_body(request, CountBody)
    engine = service.ready()
    tokens = await asyncio.to_thread(_prompt, engine, body, _toolbox(body))
    return json_response({"input_tokens": len(tokens)})


def _wanted(engine: ServingEngine, body: MessagesBody) -> Wanted:
    tools = _toolbox(body)
    settings = settings_of(body, engine.settings, body.max_tokens, body.stop_sequences)
    return Wanted((tuple(_prompt(engine, body, tools)),), settings, tools=tools, deadline=body.timeout)


def _prompt(engine: ServingEngine, body: CountBody, tools: Toolbox) -> list[int]:
    return encode_chat(engine.codec, _conversation(body), tools.tools, engine.context)


def _toolbox(body: CountBody) -> Toolbox:
    tools = [Tool.read(tool, f"tools.{at}", "input_schema") for at, tool in enumerate(body.tools or ())]
    choice = body.tool_choice or {}
    words = {"auto": "auto", "any": "required", "tool": "function", "none": "none"}
    kind = str(choice.get("type", "auto"))
    name = choice.get("name")
    return Toolbox.choose(tools, words.get(kind, kind), name if isinstance(name, str) else None)


def _conversation(body: CountBody) -> list[dict[str, Any]]:
    """The messages in the form of OpenAI's chats. Raises `ApiError` for content that is not known."""
    found: list[dict[str, Any]] = []
    if body.system is not None:
        found.append({"role": "system", "content": _texts(body.system, "system")})
    for at, message in enumerate(body.messages):
        content, place = message.get("content"), f"messages.{at}"
        if isinstance(content, list):
            found += _parts(message.get("role"), content, place)
        else:
            found.append({"role": message.get("role"), "content": content})
    return found


def _parts(role: Any, content: Sequence[Any], place: str) -> list[dict[str, Any]]:
    """The messages of one message: results of calls first, then its text and calls."""
    results, texts, calls = list[dict[str, Any]](), [], []
    for part in content:
        match part:
            case {"type": "text", "text": str()}:
                texts.append({"type": "text", "text": part["text"]})
            case {"type": "tool_result"}:
                given = _texts(part.get("content") or "", place)
                results.append({"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": given})
            case {"type": "tool_use", "name": str()}:
                function = {"name": part["name"], "arguments": json.dumps(part.get("input") or {})}
                calls.append({"id": part.get("id"), "type": "function", "function": function})
            case {"type": "thinking" | "redacted_thinking"}:
                pass  # of another model
            case _:
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise ApiError(400, f"{place}: content of type {kind!r:.40} is not known here", param=place)
    said = {"role": role, "content": texts or None} | ({"tool_calls": calls} if calls else {})
    return [*results, said] if texts or calls or not results else results


def _texts(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content or ()]
    if not isinstance(content, list) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{place}: expected a text, or a list of texts", param=place)
    return "\n".join(map(str, texts))


def _head(engine: ServingEngine) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": engine.name,
        "container": None,
    }


def _block(block: Block) -> dict[str, Any]:
    if block.name is None:
        return {"type": "text", "text": block.text, "citations": None}
    try:
        given = json.loads(block.text)
    except ValueError:  # it ended too early
        given = {}
    made = {"type": "tool_use", "id": block.id, "name": block.name, "input": given}
    return made | {"caller": {"type": "direct"}}


def _stop(last: Delta) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    reason = "stop_sequence" if last.stop_text is not None else reasons[last.finish or "length"]
    return {"stop_reason": reason, "stop_sequence": last.stop_text, "stop_details": None}


def _usage(stats: GenerationStats) -> dict[str, Any]:
    absent = ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
    return dict.fromkeys(absent) | {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.cached_tokens,
        "output_tokens": stats.generated_tokens,
    }


async def _events(service: Service, wanted: Wanted, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    engine, blocks = service.ready(), Blocks()
    nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                if blocks.last is None:
                    begun = _head(engine) | nothing | {"usage": _usage(delta.stats) | {"output_tokens": 0}}
                    yield event({"type": "message_start", "message": begun}, "message_start")
                for each in blocks.add(delta):
                    content = _block_event(each)
                    yield event(content, content["type"])
    except Exception as error:
        if blocks.last is None:  # nothing was sent: the answer can have a status of its own
            raise
        yield event(error_body(_PATH, as_api_error(service.broken(error))), "error")
        return
    assert blocks.last is not None
    ended = {"type": "message_delta", "delta": _stop(blocks.last), "usage": _usage(blocks.last.stats)}
    yield event(ended, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


def _block_event(each: BlockEvent) -> dict[str, Any]:
    is_call = each.block.name is not None
    if each.kind == "begin":
        empty: dict[str, Any] = {"input": {}} if is_call else {"text": ""}
        return {"type": "content_block_start", "index": each.index, "content_block": _block(each.block) | empty}
    if each.kind == "end":
        return {"type": "content_block_stop", "index": each.index}
    kind, field = ("input_json_delta", "partial_json") if is_call else ("text_delta", "text")
    return {"type": "content_block_delta", "index": each.index, "delta": {"type": kind, field: each.text}}
