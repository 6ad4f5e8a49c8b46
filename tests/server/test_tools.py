"""Tools in prompts: given to a template that knows them as transformers gives them, told in words to one that does
not."""

import pytest

from hybrid.server.errors import ApiError
from hybrid.server.tools import Tool, Toolbox, encode_chat

WEATHER = Tool("weather", "Of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
OTHER = Tool("other")


class Codec:
    """Keeps what a template would be given."""

    def __init__(self, knows_tools):
        self.template_knows_tools = knows_tools

    def encode_chat(self, messages, *, tools=None, enough=None):
        self.messages, self.tools, self.enough = messages, tools, enough
        return [1, 2]


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TALK = [
    {"role": "developer", "content": "be brief"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "sunny"}]},
]


def test_a_template_that_knows_tools_gets_them():
    codec = Codec(knows_tools=True)
    assert encode_chat(codec, TALK, [WEATHER], 9) == [1, 2]
    assert codec.tools == [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Of a city.", "parameters": WEATHER.parameters},
        }
    ]
    system, call, result = codec.messages
    assert (system["role"], call["content"], result) == ("system", "", TALK[2])
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]


def test_another_is_told_in_the_system_prompt():
    codec = Codec(knows_tools=False)
    encode_chat(codec, TALK, [WEATHER], 9)
    system, call, result = codec.messages
    assert system["role"] == "system" and system["content"].startswith("be brief\n\nYou may call functions.")
    assert '"name": "weather"' in system["content"] and codec.tools is None
    assert call["content"] == '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    assert result == {"role": "user", "content": "<tool_response>sunny</tool_response>"}
    encode_chat(codec, TALK[1:], [], 9)
    assert [message["role"] for message in codec.messages] == ["assistant", "user"]


@pytest.mark.parametrize("arguments", ["{", "not JSON", "[" * 100_000])
def test_arguments_that_are_no_json(arguments):
    call = {"function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(ApiError, match="are not JSON"):
        encode_chat(Codec(True), [{"role": "assistant", "content": None, "tool_calls": [call]}], [], 9)


@pytest.mark.parametrize(
    ("choice", "name", "tools", "forced"),
    [
        ("auto", None, (WEATHER, OTHER), ()),
        ("none", None, (), ()),
        ("required", None, (WEATHER, OTHER), (WEATHER, OTHER)),
        ("function", "other", (WEATHER, OTHER), (OTHER,)),
    ],
)
def test_choices(choice, name, tools, forced):
    box = Toolbox.choose([WEATHER, OTHER], choice, name)
    assert (box.tools, box.forced) == (tools, forced)


@pytest.mark.parametrize(("choice", "name"), [("required", None), ("function", "x"), ("function", None)])
def test_a_forced_choice_needs_its_tool(choice, name):
    with pytest.raises(ApiError, match="there is none"):
        Toolbox.choose([] if choice == "required" else [WEATHER], choice, name)


def test_too_many_tools():
    with pytest.raises(ApiError, match="129 of them, at most 128"):
        Toolbox.choose([WEATHER] * 129, "auto")


def test_arguments_are_an_object():
    assert OTHER.schema == {"type": "object"}
    assert Tool("a", "", {"properties": {}}).schema == {"type": "object", "properties": {}}
