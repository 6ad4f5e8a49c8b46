"""Tools: what a client offers, how the model is told of them, and what a forced choice makes of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.formats.text import TextCodec
from hybrid.server.calls import CLOSE, OPEN
from hybrid.server.errors import ApiError

_MOST_TOOLS = 128
_TEXT = f"""You may call functions. To call one, answer with nothing but
{OPEN}{{"name": NAME, "arguments": ARGUMENTS}}{CLOSE}
ARGUMENTS being a JSON object that fits its schema. The functions, one a line:
"""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; parameters: the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})

    @classmethod
    def read(cls, tool: Any, place: str, schema: str = "parameters") -> Tool:
        """A tool as a client describes it. Raises `ApiError` naming `place` in the request for what is none."""
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or not tool["name"]:
            raise ApiError(400, f"{place}: expected a function with a name", param=place)
        parameters = tool.get(schema)
        if not isinstance(parameters, Mapping | None):
            raise ApiError(400, f"{place}.{schema}: expected a JSON schema, an object", param=place)
        return cls(tool["name"], str(tool.get("description") or ""), parameters or {"type": "object"})

    @property
    def schema(self) -> dict[str, Any]:
        """Of its arguments, which are an object."""
        return {"type": "object", **self.parameters}

    def as_openai(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request. forced: those of which one must be called; empty where the model may choose."""

    tools: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()

    @classmethod
    def choose(cls, tools: Sequence[Tool], choice: str, name: str | None = None) -> Toolbox:
        """choice: `auto`, `none`, `required`, or `function` with its `name`. Raises `ApiError` for any other."""
        if len(tools) > _MOST_TOOLS:
            raise ApiError(400, f"tools: {len(tools)} of them, at most {_MOST_TOOLS} are taken", param="tools")
        if choice == "none":
            return cls()
        named = tuple(tool for tool in tools if choice == "required" or tool.name == name)
        if choice in ("required", "function") and not named:
            wanted = "some tools" if choice == "required" else f"a tool of the name {name!r:.80}"
            raise ApiError(400, f"tool_choice needs {wanted} in tools; there is none", param="tool_choice")
        if choice not in ("auto", "required", "function"):
            expected = "expected none, auto, required or a function's name"
            raise ApiError(400, f"tool_choice is {choice!r:.80}, {expected}", param="tool_choice")
        return cls(tuple(tools), named)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)


def encode_chat(
    codec: TextCodec, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], enough: int
) -> list[int]:
    """The prompt of a conversation, its tools told in the model's own way, or in plain words where it has none.

    Messages are in the form of OpenAI's chats. Raises `InputError` for messages that the model's template refuses.
    """
    if codec.template_knows_tools:
        offered = [tool.as_openai() for tool in tools]
        return codec.encode_chat([_structured(message) for message in messages], tools=offered or None, enough=enough)
    plain = [_in_words(message) for message in messages]
    if tools:
        listed = _TEXT + "\n".join(json.dumps(tool.as_openai()["function"], ensure_ascii=False) for tool in tools)
        begun = bool(plain) and plain[0].get("role") == "system" and isinstance(plain[0].get("content"), str)
        system = [plain.pop(0)["content"]] if begun else []
        plain.insert(0, {"role": "system", "content": "\n\n".join([*system, listed])})
    return codec.encode_chat(plain, enough=enough)


def _role(message: Mapping[str, Any]) -> Any:
    return "system" if message.get("role") == "developer" else message.get("role")


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls of an earlier answer: name, and arguments parsed. Raises `ApiError` for what is none."""
    found = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ApiError(400, "messages: a tool call has no function with a name", param="messages")
        arguments = function.get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            reason = f"messages: the arguments of a call of {function['name']!r:.80} are not JSON"
            raise ApiError(400, reason, param="messages") from error
        found.append({"name": function["name"], "arguments": parsed})
    return found


def _structured(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [{"type": "function", "function": call} for call in _calls(message)]
    content = message.get("content")
    absent = content is None and calls
    return {**message, "role": _role(message), "content": "" if absent else content} | (
        {"tool_calls": calls} if calls else {}
    )


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    """For a template that knows neither calls nor their results."""
    calls = [f"{OPEN}{json.dumps(call, ensure_ascii=False)}{CLOSE}" for call in _calls(message)]
    content = message.get("content")
    if calls:
        content = "\n".join([*([content] if content and isinstance(content, str) else []), *calls])
    if message.get("role") != "tool":
        return {**message, "role": _role(message), "content": content}
    return {"role": "user", "content": f"<tool_response>{_plain(content)}</tool_response>"}


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content or "")
