"""The server over the embedded model: what comes out is what the engine itself gives."""

import asyncio
import json

import httpx
import pytest
from server_cases import CHAT, HELLO, WEATHER, events, running, service_of

from hybrid import AsyncEngine, Engine, EngineConfig, SamplingSettings
from hybrid.chat.remote import RemoteModel

GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def served():
    """An engine, and a client of its server."""
    engine = AsyncEngine.load(config=EngineConfig(threads=1))
    with running(service_of(engine)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield engine, client
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def alone():
    with Engine.load(config=EngineConfig(threads=1)) as engine:
        yield engine


def ask(client, body, path=CHAT):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_chat_says_what_the_engine_says(served, alone):
    settings = SamplingSettings(temperature=0, max_new_tokens=16)
    expected = "".join(step.text for step in alone.reply(HELLO, settings))
    whole = ask(served[1], {"messages": HELLO, **GREEDY}).json()
    assert whole["choices"][0]["message"]["content"] == expected
    streamed = events(ask(served[1], {"messages": HELLO, "stream": True, **GREEDY}))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed[:-1]) == expected


def test_a_second_turn_finds_the_first_in_the_cache(served):
    talk = [{"role": "user", "content": "Tell me about the sea and the ships on it. " * 8}]
    first = ask(served[1], {"messages": talk, **GREEDY}).json()
    talk += [first["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    usage = ask(served[1], {"messages": talk, **GREEDY}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] // 32 * 32 > 0


def test_a_seed_repeats_and_answers_differ(served):
    body = {"messages": HELLO, "temperature": 1.5, "top_p": 1, "top_k": 0, "seed": 3, "n": 2, "max_tokens": 12}
    first, second = (ask(served[1], body).json()["choices"] for _ in range(2))
    assert [choice["message"] for choice in first] == [choice["message"] for choice in second]
    assert first[0]["message"] != first[1]["message"]


def test_a_schema_holds(served):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}, "mood": {"enum": ["good", "bad"]}},
        "required": ["answer", "mood"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"messages": HELLO, "response_format": form, **GREEDY, "max_tokens": 100}
    found = json.loads(ask(served[1], body).json()["choices"][0]["message"]["content"])
    assert set(found) == {"answer", "mood"} and found["answer"] in (True, False) and found["mood"] in ("good", "bad")


def test_a_schema_that_cannot_be_used(served):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    answer = served[1].post(CHAT, json={"messages": HELLO, "response_format": form})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_forced_call(served):
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"] |= {
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "additionalProperties": False,
    }
    body = {"messages": HELLO, "tools": [tool], "tool_choice": "required", **GREEDY, "max_tokens": 100}
    (choice,) = ask(served[1], body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("weather", "tool_calls")
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")


def test_echo_scores_a_prompt_as_the_engine_does(served):
    engine, client = served
    prompt = engine.codec.encode("The sun is shining and the sea is calm.")
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 0}
    found = ask(client, body, "/v1/completions").json()["choices"][0]["logprobs"]
    expected = asyncio.run(engine.score(prompt, 2))
    assert found["token_logprobs"] == [each.logprob for each in expected]
    assert all(
        max(top.values()) >= taken
        for top, taken in zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True)
    )


def test_many_at_once_say_what_each_says_alone(served):
    client = served[1]
    prompts = [f"{word} is" for word in ("The sun", "A ship", "My friend", "Rain", "Love", "Every dog")]
    alone = [ask(client, {"prompt": p, **GREEDY}, "/v1/completions").json()["choices"][0]["text"] for p in prompts]
    together = ask(client, {"prompt": prompts, **GREEDY}, "/v1/completions").json()["choices"]
    assert [choice["text"] for choice in together] == alone


def test_clients_that_vanish_leave_no_block_behind(served):
    engine, client = served

    async def vanish(url):
        async with httpx.AsyncClient(base_url=url) as gone:
            body = {"messages": HELLO, "stream": True, "max_tokens": 500, "logit_bias": {"1": -100, "2": -100}}
            async with gone.stream("POST", CHAT, json=body) as response:
                async for _ in response.aiter_lines():
                    break

    async def all_of_them():
        await asyncio.gather(*(vanish(str(client.base_url)) for _ in range(20)))
        for _ in range(500):
            figures = engine.figures()
            if not (figures.running or figures.waiting or figures.kv_blocks_used):
                return figures
            await asyncio.sleep(0.01)
        raise AssertionError(figures)

    before = engine.figures().cancelled_total
    assert asyncio.run(all_of_them()).cancelled_total == before + 20


def test_a_timeout_leaves_no_block_behind(served):
    engine, client = served
    body = {"messages": HELLO, "max_tokens": 900, "logit_bias": {"1": -100, "2": -100}, "timeout": 0.05, "n": 3}
    answer = client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    assert "not finished within 0.05 s" in answer.json()["error"]["message"]
    late = client.post("/v1/completions", json={"prompt": "a", "echo": True, "logprobs": 0, "timeout": 1e-9})
    assert late.status_code == 408
    figures = engine.figures()
    assert (figures.running, figures.waiting, figures.kv_blocks_used) == (0, 0, 0)


def test_the_chat_of_the_terminal_over_the_server(served):
    model = RemoteModel(str(served[1].base_url))
    settings = SamplingSettings(temperature=0, max_new_tokens=8)
    steps = list(model.reply(HELLO, settings, lambda done, total: None))
    expected = ask(served[1], {"messages": HELLO, "temperature": 0, "max_tokens": 8}).json()
    assert "".join(step.text for step in steps) == expected["choices"][0]["message"]["content"]
    assert steps[-1].stats.prompt_tokens == expected["usage"]["prompt_tokens"] == model.count_tokens(HELLO)
    assert model.context == 1024 and "exact" in model.describe_placement()
