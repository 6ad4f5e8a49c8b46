"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from hybrid.generation import GenerationStats
from hybrid.server.answer import Answer, Delta, Wanted, collect, deltas_of
from hybrid.server.bodies import ChatBody
from hybrid.server.calls import CallPiece
from hybrid.server.errors import ApiError, as_api_error, error_body
from hybrid.server.openai import DONE, chat_logprobs, head, timings, usage, usage_of
from hybrid.server.protocols import ServingEngine
from hybrid.server.sampling import logit_bias_of, schema_of, settings_of
from hybrid.server.service import Service
from hybrid.server.token_text import TokenTexts
from hybrid.server.tools import Tool, Toolbox, encode_chat
from hybrid.server.wire import event, json_response, read_body, stream, while_connected


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ChatBody)
    engine = service.ready()
    wanted = await asyncio.to_thread(wanted_of, engine, body)
    deltas = deltas_of(engine, wanted)
    if body.stream:
        return await stream(request, _chunks(service, body, wanted, deltas), service.settings.patience)
    async with while_connected(request.receive):
        answers = await collect(deltas, wanted.n)
    return json_response(_whole(engine, body, answers))


def wanted_of(engine: ServingEngine, body: ChatBody) -> Wanted:
    """What `body` asks for. Tokenises: for a thread of its own. Raises `ApiError` or `InputError`."""
    tools = toolbox_of(body)
    top = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    most = body.max_completion_tokens or body.max_tokens
    return Wanted(
        (tuple(encode_chat(engine.codec, body.messages, tools.tools, engine.context)),),
        settings_of(body, engine.settings, most, body.stop, body.seed),
        body.n or 1,
        body.frequency_penalty or 0.0,
        body.presence_penalty or 0.0,
        logit_bias_of(body),
        top,
        schema_of(body.response_format, "response_format"),
        tools,
        body.timeout,
    )


def toolbox_of(body: ChatBody) -> Toolbox:
    """The tools that `body` offers. Raises `ApiError` for what is none."""
    tools = []
    for at, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            raise ApiError(400, f"tools.{at}: only tools of type function are known here", param=f"tools.{at}")
        tools.append(Tool.read(tool.get("function"), f"tools.{at}.function"))
    choice = body.tool_choice
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        return Toolbox.choose(tools, str(choice.get("type")), name if isinstance(name, str) else None)
    return Toolbox.choose(tools, choice or "auto") if tools or choice not in (None, "auto") else Toolbox()


def _whole(engine: ServingEngine, body: ChatBody, answers: list[Answer]) -> dict[str, Any]:
    texts = TokenTexts(engine.codec)
    choices = []
    for index, answer in enumerate(answers):
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": [_call(call) for call in answer.calls]}
        logprobs = chat_logprobs(answer.logprobs, texts) if body.logprobs else None
        finish = answer.last.finish if answer.last else None
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
    whole = head("chat.completion", "chatcmpl", engine.name) | {
        "choices": choices,
        "usage": usage(answers, len(answers)),
    }
    last = answers[0].last
    return whole | ({"timings": timings(last.stats)} if last else {})


def _call(call: dict[str, str]) -> dict[str, Any]:
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": call["name"], "arguments": call["arguments"]},
    }


async def _chunks(
    service: Service, body: ChatBody, wanted: Wanted, deltas: AsyncGenerator[Delta, None]
) -> AsyncGenerator[bytes, None]:
    engine = service.ready()
    begun = head("chat.completion.chunk", "chatcmpl", engine.name)
    texts, last = TokenTexts(engine.codec), dict[int, GenerationStats]()
    usage_null = {"usage": None} if body.wants_usage else {}
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                first = delta.index not in last
                last[delta.index] = delta.stats
                for choice in _choices(delta, first, body, texts):
                    timed = {"timings": timings(delta.stats)} if choice["finish_reason"] else {}
                    yield event(begun | {"choices": [choice]} | usage_null | timed)
    except Exception as error:
        if not last:  # nothing was sent: the answer can have a status of its own
            raise
        failed = as_api_error(service.broken(error))
        yield event(error_body("", failed))
        return
    if body.wants_usage:
        counts = usage_of(list(last.values())[:1], sum(stats.generated_tokens for stats in last.values()))
        yield event(begun | {"choices": [], "usage": counts})
    yield DONE


def _choices(delta: Delta, first: bool, body: ChatBody, texts: TokenTexts) -> list[dict[str, Any]]:
    """The choices of `delta`'s chunks: role with the first token, text or a piece of a call, and how it ended."""
    found: list[dict[str, Any]] = [{"role": "assistant", "content": ""}] if first else []
    logprobs = chat_logprobs([delta.logprob], texts) if body.logprobs and delta.logprob else None
    if delta.text or logprobs:
        found.append({"content": delta.text})
    at = len(found) - 1
    found += [{"tool_calls": [_call_piece(piece)]} for piece in delta.calls]
    choices: list[dict[str, Any]] = [
        {"index": delta.index, "delta": each, "logprobs": None, "finish_reason": None} for each in found
    ]
    if logprobs:
        choices[at]["logprobs"] = logprobs
    if delta.finish:
        choices.append({"index": delta.index, "delta": {}, "logprobs": None, "finish_reason": delta.finish})
    return choices


def _call_piece(piece: CallPiece) -> dict[str, Any]:
    function = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name} | function}
