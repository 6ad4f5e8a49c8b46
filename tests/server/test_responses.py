"""`POST /v1/responses`: input of every form, the events in their order, and what is not kept."""

import pytest
from fake_engine import FakeEngine
from server_cases import WEATHER, events, post

URL = "/v1/responses"
TOOL = {"type": "function", **WEATHER["function"]}


def test_input_items_become_a_chat():
    engine = FakeEngine()
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "1", "output": "sunny"},
        {"role": "developer", "content": [{"type": "input_text", "text": "c"}]},
    ]
    assert post(URL, {"input": items, "instructions": "s"}, engine).status_code == 200
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'},
        {"role": "user", "content": "<tool_response>sunny</tool_response>"},
        {"role": "system", "content": "c"},
    ]
    assert engine.requests[0].prompt == tuple(engine.codec.encode_chat(expected))


def test_text_and_a_call_in_a_stream():
    engine = FakeEngine('So: <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>')
    found = events(post(URL, {"input": "a", "tools": [TOOL], "stream": True}, engine))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert [kind for kind in dict.fromkeys(kinds)] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "completed",
    ]
    message, call = found[-1]["response"]["output"]
    assert message["content"][0]["text"] == "So: "
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Rome"}')
    assert [e["item"] for e in found if e["type"] == "response.output_item.done"] == [message, call]


def test_a_form_becomes_a_constraint():
    engine = FakeEngine()
    form = {"type": "json_schema", "name": "a", "schema": {"type": "integer"}}
    answer = post(URL, {"input": "a", "text": {"format": form}}, engine).json()
    assert engine.requests[0].constraint.schema == {"type": "integer"}
    assert (answer["output"][0]["content"][0]["text"], answer["text"]["format"]["name"]) == ("3", "a")


def test_log_probabilities():
    body = {"input": "a", "include": ["message.output_text.logprobs"], "top_logprobs": 1, "max_output_tokens": 1}
    (found,) = post(URL, body).json()["output"][0]["content"][0]["logprobs"]
    assert (found["token"], found["logprob"], len(found["top_logprobs"])) == ("one", -0.25, 1)


def test_a_failure_within_a_stream_is_its_last_event():
    engine = FakeEngine("one two three")
    steps = engine._steps

    async def failing(request):
        async for step in steps(request):
            yield step
            engine.failure = RuntimeError("a worker died")

    engine._steps = failing
    last = events(post(URL, {"input": "a", "stream": True}, engine))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "a worker died" in last["response"]["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 1}, "input"),
        ({"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "a", "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(body, param):
    answer = post(URL, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
