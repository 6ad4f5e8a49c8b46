"""What `POST /v1/responses` is asked, in the words of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.server.answer import Wanted
from hybrid.server.bodies import ResponsesBody
from hybrid.server.errors import ApiError
from hybrid.server.protocols import ServingEngine
from hybrid.server.sampling import schema_of, settings_of
from hybrid.server.tools import Tool, Toolbox, encode_chat

_TEXTS = ("input_text", "output_text", "text", "refusal")
_LOGPROBS = "message.output_text.logprobs"


def wanted_of(engine: ServingEngine, body: ResponsesBody) -> Wanted:
    """What `body` asks for. Tokenises: for a thread of its own. Raises `ApiError` or `InputError`."""
    if body.previous_response_id is not None:
        problem = "previous_response_id: nothing is stored here; send the whole conversation as input"
        raise ApiError(400, problem, param="previous_response_id")
    tools = _toolbox(body)
    wants_logprobs = body.top_logprobs is not None or _LOGPROBS in (body.include or ())
    return Wanted(
        (tuple(encode_chat(engine.codec, conversation(body), tools.tools, engine.context)),),
        settings_of(body, engine.settings, body.max_output_tokens, None),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        top_logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        schema=schema_of(body.text.format if body.text else None, "text.format"),
        tools=tools,
        deadline=body.timeout,
    )


def _toolbox(body: ResponsesBody) -> Toolbox:
    tools = []
    for at, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            raise ApiError(400, f"tools.{at}: only tools of type function are known here", param=f"tools.{at}")
        tools.append(Tool.read(tool, f"tools.{at}"))
    choice = body.tool_choice or "auto"
    if isinstance(choice, dict):
        name = choice.get("name")
        return Toolbox.choose(tools, str(choice.get("type")), name if isinstance(name, str) else None)
    return Toolbox.choose(tools, choice)


def conversation(body: ResponsesBody) -> list[dict[str, Any]]:
    """The input in the form of OpenAI's chats. Raises `ApiError` for items that are not known."""
    found: list[dict[str, Any]] = []
    if body.instructions is not None:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for at, item in enumerate(body.input):
        found += _messages(item, f"input.{at}")
    return found


def _messages(item: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    match item.get("type", "message"):
        case "message":
            return [{"role": item.get("role"), "content": _content(item.get("content"), place)}]
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return [{"role": "assistant", "content": None, "tool_calls": [call]}]
        case "function_call_output":
            content = _content(item.get("output"), place)
            return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": content}]
        case "reasoning":
            return []  # of another model
        case kind:
            raise ApiError(400, f"{place}: an item of type {kind!r:.40} is not known here", param=place)


def _content(content: Any, place: str) -> Any:
    """Text, or a list of parts as chats have them."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind not in _TEXTS:
            raise ApiError(400, f"{place}: content of type {kind!r:.40} is not known here", param=place)
    return [{"type": "text", "text": part.get("text", part.get("refusal", ""))} for part in content]
