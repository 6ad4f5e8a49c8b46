"""Calls in text: however it is cut into pieces, the same comes out."""

import itertools
import json

import pytest

from hybrid.server.calls import CallReader

ONE = '{"name": "f", "arguments": {"a": "}{\\"", "b": [1, {}]}}'
ARGUMENTS = '{"a": "}{\\"", "b": [1, {}]}'


def read(pieces, names=("f", "g")):
    """The text, and name and arguments of each call."""
    reader, shown, calls = CallReader(names), "", []
    for piece in pieces:
        text, found = reader.push(piece)
        shown += text
        for part in found:
            if part.name is not None:
                calls.append([part.name, ""])
                assert part.id.startswith("call_") and part.index == len(calls) - 1
            calls[part.index][1] += part.arguments
    return shown + reader.rest(), calls


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("plain {text} <tool", "plain {text} <tool", []),
        ("", "", []),
        ("  \n", "  \n", []),
        (ONE, "", [["f", ARGUMENTS]]),
        (f"\n{ONE}\n", "\n", [["f", ARGUMENTS]]),
        (f"<tool_call>\n{ONE}\n</tool_call>", "", [["f", ARGUMENTS]]),
        (f"So. <tool_call>{ONE}</tool_call>", "So. ", [["f", ARGUMENTS]]),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "", [["f", ARGUMENTS]] * 2),
        ('{"name":"g","parameters":{}}', "", [["g", "{}"]]),
        ('{"name": "h", "arguments": {}}', '{"name": "h", "arguments": {}}', []),  # no such tool
        ('<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
        ('{"city": "Rome"}', '{"city": "Rome"}', []),
        ('{"name": "f", "arguments": {"a": 1', "", [["f", '{"a": 1']]),  # it ended too early
        ("<tool_call>not JSON", "<tool_call>not JSON", []),
        ("2 < 3 <tool_call", "2 < 3 <tool_call", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_and_calls(text, shown, calls, size):
    pieces = (
        ["".join(piece) for piece in itertools.batched(text, size)]
        if hasattr(itertools, "batched")
        else [text[at : at + size] for at in range(0, len(text), size)]
    )
    found, made = read(pieces)
    assert (found.rstrip("\n") if calls else found, made) == (shown.rstrip("\n") if calls else shown, calls)
    assert all(json.loads(arguments) for _, arguments in made if arguments.endswith("]}"))


def test_text_is_not_held_back():
    reader = CallReader(["f"])
    assert [reader.push(text)[0] for text in ("one ", "two ", "<", "b>")] == ["one ", "two ", "", "<b>"]


def test_arguments_stream():
    reader = CallReader(["f"])
    pieces = [reader.push(text)[1] for text in ('{"name": "f", "arg', 'uments": {"a', '": 1}', "}")]
    assert [[piece.arguments for piece in found] for found in pieces] == [[], ["", '{"a'], ['": 1}'], []]


def test_without_tools_everything_is_text():
    assert read([ONE], names=()) == (ONE, [])
