"""Anthropic's own client, unmodified, against the server over a socket."""

import pytest
from fake_engine import FakeEngine
from server_cases import HELLO, running, service_of

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install -e .[clients]")
ASKED = {"model": "any", "max_tokens": 50, "messages": HELLO}
WEATHER = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine("one two three")
    with (
        running(service_of(engine, api_key="secret")) as url,
        anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client,
    ):
        yield engine, client


@pytest.fixture
def client(served):
    return served[1]


def test_a_message(served):
    engine, client = served
    answer = client.messages.create(**ASKED, system="Be brief.", extra_body={"temperature": 0.5, "top_k": 3})
    assert [block.text for block in answer.content] == ["one two three"]
    assert (answer.stop_reason, answer.usage.output_tokens, answer.usage.cache_read_input_tokens) == ("end_turn", 4, 1)
    request = engine.requests[-1]
    asked = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert request.prompt == tuple(engine.codec.encode_chat(asked))
    assert (request.settings.temperature, request.settings.top_k, request.settings.max_new_tokens) == (0.5, 3, 50)


def test_a_message_streams(client):
    with client.messages.stream(**ASKED) as stream:
        assert list(stream.text_stream) == ["one", " two", " three"]
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 4)


def test_a_message_ends_at_its_limit(client):
    assert client.messages.create(**(ASKED | {"max_tokens": 1})).stop_reason == "max_tokens"


def test_a_tool_call_and_its_result(client):
    tools = {"tools": [WEATHER], "tool_choice": {"type": "any"}}
    answer = client.messages.create(**ASKED, **tools)
    (call,) = answer.content
    assert (call.type, call.name, call.input, answer.stop_reason) == ("tool_use", "weather", {"city": "x"}, "tool_use")
    with client.messages.stream(**ASKED, **tools) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == ("weather", {"city": "x"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    talk = [*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**(ASKED | {"messages": talk})).content[0].text == "one two three"


def test_tokens_are_counted(served):
    engine, client = served
    assert client.messages.count_tokens(model="any", messages=HELLO).input_tokens == len(
        engine.codec.encode_chat(HELLO)
    )


def test_errors_are_the_clients_own(served):
    engine, client = served
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match="type 'image' is not known here"):
        client.messages.create(**(ASKED | {"messages": [{"role": "user", "content": [picture]}]}))
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**ASKED)
    engine.most = 0
    try:
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(**ASKED)
    finally:
        engine.most = 1000
