"""OpenAI's own client, unmodified, against the server over a socket."""

import asyncio
import json

import pytest
from fake_engine import FakeEngine
from server_cases import HELLO, WEATHER, running, service_of

openai = pytest.importorskip("openai", reason="openai is not installed: pip install -e .[clients]")
MODEL = "any"


@pytest.fixture(scope="module")
def served():
    """An engine, the address of its server, and a client."""
    engine = FakeEngine("one two three")
    with (
        running(service_of(engine, api_key="secret")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
    ):
        yield engine, url, client


@pytest.fixture
def client(served):
    return served[2]


def test_a_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one two three", "stop")
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_a_chat_streams(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
    assert chunks[-1].usage.completion_tokens == 4


def test_many_chats_at_once(served):
    _, url, _ = served

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:

            async def ask():
                stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask() for _ in range(20)))

    assert asyncio.run(ask_all()) == ["one two three"] * 20


def test_a_tool_call(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "x"})
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_tool_call_streams(client):
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required") as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "x"})


def test_an_answer_of_a_schema_is_parsed(client):
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        people: int

    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=City)
    assert answer.choices[0].message.parsed == City(name="x", people=3)
    response = client.responses.parse(model=MODEL, input="Hello", text_format=City)
    assert response.output_parsed == City(name="x", people=3)


def test_a_completion(client):
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=2, echo=True, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["aone two", "aone two", "bone two", "bone two"]
    assert answer.choices[0].logprobs.tokens == ["a", "one", " two"]
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.25, -0.25]
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(model=MODEL, prompt="a", stream=True))
    assert text == "one two three"


def test_a_response(client):
    response = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.")
    assert (response.output_text, response.status, response.store) == ("one two three", "completed", False)
    assert response.usage.input_tokens_details.cached_tokens == 1
    cut = client.responses.create(model=MODEL, input="Hello", max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_response_streams(client):
    with client.responses.stream(model=MODEL, input="Hello") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "one two three"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.completed"


def test_a_response_calls_a_tool(client):
    tool = {"type": "function", **WEATHER["function"]}
    options = {"model": MODEL, "input": "Hello", "tools": [tool], "tool_choice": "required"}
    (call,) = client.responses.create(**options).output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "x"})
    with client.responses.stream(**options) as stream:
        (streamed,) = stream.get_final_response().output
    assert json.loads(streamed.arguments) == {"city": "x"}
    items = [{"role": "user", "content": "Hello"}, call.model_dump(exclude={"parsed_arguments"})]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert client.responses.create(model=MODEL, input=items).output_text == "one two three"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_errors_are_the_clients_own(served):
    engine, _, client = served
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine.most = 0
    try:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=MODEL, messages=HELLO)
    finally:
        engine.most = 1000
