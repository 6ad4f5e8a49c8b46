"""Anthropic's endpoints: the events in their order, reasons for the end, and what is refused."""

import pytest
from fake_engine import FakeEngine
from server_cases import HELLO, events, post

URL = "/v1/messages"
ASKED = {"max_tokens": 50, "messages": HELLO}
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def test_events_come_in_their_order():
    answer = post(URL, ASKED | {"stream": True}, FakeEngine("one two"))
    found = events(answer)
    assert [event["type"] for event in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert answer.text.splitlines()[0] == "event: message_start"
    start, ended = found[0]["message"], found[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert ended["delta"] == {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None}
    assert ended["usage"]["output_tokens"] == 3


def test_text_before_a_call_is_a_block_of_its_own():
    engine = FakeEngine('So: <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>')
    answer = post(URL, ASKED | {"tools": [TOOL]}, engine).json()
    text, call = answer["content"]
    assert text == {"type": "text", "text": "So: ", "citations": None}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Rome"})
    assert answer["stop_reason"] == "tool_use"
    found = events(post(URL, ASKED | {"tools": [TOOL], "stream": True}, engine))
    begun = [event["content_block"] for event in found if event["type"] == "content_block_start"]
    assert [block["type"] for block in begun] == ["text", "tool_use"] and begun[1]["input"] == {}
    json_text = "".join(e["delta"].get("partial_json", "") for e in found if e["type"] == "content_block_delta")
    assert json_text == '{"city": "Rome"}'


def test_which_stop_sequence_it_was():
    engine = FakeEngine("one two three")
    steps = engine._steps

    async def stopped(request):
        async for served in steps(request):
            if served.step.text == " two":
                step = type(served.step)("", served.step.token, served.step.stats, "stop")
                yield type(served)(step)
                return
            yield served

    engine._steps = stopped
    answer = post(URL, ASKED | {"stop_sequences": ["x", "two"]}, engine).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "two")


def test_an_empty_answer_has_an_empty_block():
    assert post(URL, ASKED, FakeEngine("")).json()["content"] == [{"type": "text", "text": "", "citations": None}]


def test_parts_of_messages_become_chats():
    engine = FakeEngine()
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    assert post(URL, ASKED | {"messages": talk, "system": [{"type": "text", "text": "s"}]}, engine).status_code == 200
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'},
        {"role": "user", "content": "<tool_response>sunny</tool_response>"},
        {"role": "user", "content": "And?"},
    ]
    assert engine.requests[0].prompt == tuple(engine.codec.encode_chat(expected))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HELLO},
        ASKED | {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        ASKED | {"system": [1]},
        ASKED | {"tools": [{"input_schema": {}}]},
        ASKED | {"tool_choice": {"type": "tool", "name": "x"}},
        ASKED | {"tool_choice": {"type": "often"}, "tools": [TOOL]},
        ASKED | {"messages": [{"role": "wizard", "content": "a"}]},
    ],
)
def test_what_is_wrong_is_said_in_anthropics_shape(body):
    answer = post(URL, body)
    assert (answer.status_code, answer.json()["type"]) == (400, "error"), answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
