"""`POST /v1/chat/completions`: fields in, shapes out."""

import pytest
from fake_engine import FakeEngine
from server_cases import CHAT, HELLO, WEATHER, ask, events, post, service_of


def test_a_whole_answer():
    engine = FakeEngine("one two three")
    answer = post(CHAT, {"messages": HELLO}, engine).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two three", "refusal": None, "annotations": []}
    assert (choice["finish_reason"], answer["object"], answer["model"]) == ("stop", "chat.completion", "fake")
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    timings = answer["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (1, 3, 4)
    assert (timings["prompt_ms"], timings["predicted_ms"], timings["predicted_per_second"]) == (500, 750, 4)
    assert engine.requests[0].prompt == tuple(engine.codec.encode_chat(HELLO))


def test_a_stream_is_role_text_finish_usage_done():
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    answer = post(CHAT, body)
    *chunks, last, done = events(answer)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {"content": " two"},
        {"content": " three"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], 4, "[DONE]")
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_a_stream_has_no_usage_unless_it_is_asked_for():
    assert not any("usage" in chunk for chunk in events(post(CHAT, {"messages": HELLO, "stream": True}))[:-1])


def test_settings_become_the_request():
    engine = FakeEngine()
    body = {
        "messages": HELLO,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "frequency_penalty": -1,
        "presence_penalty": 2,
        "logit_bias": {"17": -100},
        "seed": -1,
        "stop": ["a", "b"],
        "max_tokens": 3,
        "max_completion_tokens": 2,
        "no such field": {},
    }
    assert post(CHAT, body, engine).json()["choices"][0]["finish_reason"] == "length"
    (request,) = engine.requests
    settings = request.settings
    assert (settings.temperature, settings.top_p, settings.top_k, settings.min_p) == (0.5, 0.25, 7, 0.125)
    assert (settings.repetition_penalty, settings.seed, settings.stop) == (1.5, 2**63 - 1, ("a", "b"))
    assert (settings.max_new_tokens, request.frequency_penalty, request.presence_penalty) == (2, -1, 2)
    assert request.logit_bias == {17: -100}
    assert (request.top_logprobs, request.constraint) == (None, None)


def test_null_is_a_field_left_out_and_the_models_own_settings_hold():
    engine = FakeEngine()
    names = ("temperature", "top_p", "n", "stop", "max_tokens", "tools", "tool_choice", "response_format", "stream")
    assert post(CHAT, {"messages": HELLO} | dict.fromkeys(names), engine).status_code == 200
    assert engine.requests[0].settings == engine.settings


def test_several_answers_have_seeds_that_count_up():
    engine = FakeEngine()
    answer = post(CHAT, {"messages": HELLO, "n": 3, "seed": 5}, engine).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert sorted(request.settings.seed for request in engine.requests) == [5, 6, 7]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, 12)


def test_several_answers_in_one_stream():
    *chunks, done = events(post(CHAT, {"messages": HELLO, "n": 2, "stream": True}))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "one two three", 1: "one two three"} and done == "[DONE]"


def test_log_probabilities_have_bytes_and_the_likeliest():
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    (first,) = post(CHAT, body).json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("one", -0.25, list(b"one"))
    # Token 100 is a byte that is a part of a character.
    assert first["top_logprobs"][0] == {"token": "bytes:\\xa1", "logprob": -0.5, "bytes": [0xA1]}
    streamed = events(post(CHAT, body | {"stream": True}))
    assert [c["choices"][0]["logprobs"]["content"] for c in streamed[:-1] if c["choices"][0]["logprobs"]] == [[first]]


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}, {"type": "integer"}),
    ],
)
def test_a_response_format_becomes_a_constraint(form, schema):
    engine = FakeEngine()
    post(CHAT, {"messages": HELLO, "response_format": form}, engine)
    constraint = engine.requests[0].constraint
    assert (constraint and constraint.schema) == schema


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_streams_and_comes_whole(choice):
    engine = FakeEngine()
    body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
    (whole,) = post(CHAT, body, engine).json()["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "x"}'}
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
    schema = engine.requests[0].constraint.schema
    assert schema["properties"]["name"] == {"const": "weather"}
    assert schema["properties"]["arguments"] == WEATHER["function"]["parameters"]
    deltas = [chunk["choices"][0]["delta"] for chunk in events(post(CHAT, body | {"stream": True}, engine))[:-1]]
    first, *more = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
    assert first["function"]["arguments"] + "".join(m["function"]["arguments"] for m in more) == '{"city": "x"}'


def test_a_model_may_call_of_itself():
    engine = FakeEngine('Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>')
    (choice,) = post(CHAT, {"messages": HELLO, "tools": [WEATHER]}, engine).json()["choices"]
    assert choice["message"]["content"] == "Let me see. "
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
    assert engine.requests[0].constraint is None
    assert "weather" in engine.codec.decode(engine.requests[0].prompt)


def test_with_tool_choice_none_the_model_is_told_of_no_tools():
    engine = FakeEngine()
    post(CHAT, {"messages": HELLO, "tools": [WEATHER], "tool_choice": "none"}, engine)
    assert engine.requests[0].prompt == tuple(engine.codec.encode_chat(HELLO))


def test_calls_and_their_results_come_back_in_words_where_the_template_knows_none():
    engine = FakeEngine()
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    assert post(CHAT, {"messages": messages}, engine).status_code == 200
    text = engine.codec.decode(engine.requests[0].prompt)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert "<tool_response>sunny</tool_response>" in text


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", "Hello", "messages"),
        ("messages", [], "messages"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], None),
        ("temperature", "0.5", "temperature"),
        ("temperature", -1, "temperature"),
        ("top_p", 1.5, "top_p"),
        ("n", 0, "n"),
        ("n", True, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("stop", [""], "stop"),
        ("stop", 3, "stop"),
        ("stream_options", [], "stream_options"),
        ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage"),
        ("logit_bias", {"a": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias"),
        ("logit_bias", {"1": "x"}, "logit_bias.1"),
        ("top_logprobs", 2, "top_logprobs"),
        ("response_format", {"type": "yaml"}, "response_format"),
        ("tools", [{"type": "function"}], "tools.0.function"),
        ("tools", [{"type": "web"}], "tools.0"),
        ("tool_choice", "required", "tool_choice"),
        ("tool_choice", "sometimes", "tool_choice"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(field, value, param, stream):
    engine = FakeEngine()
    answer = post(CHAT, {"messages": HELLO, "stream": stream, field: value}, engine)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"] and not engine.requests


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b'{"messages": [' + b"[" * 5000])
def test_a_body_that_is_no_json_object(body):
    answer = ask("POST", CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long():
    answer = post(CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_full_queue_says_when_to_come_back(stream, n):
    answer = post(CHAT, {"messages": HELLO, "stream": stream, "n": n}, FakeEngine(most=0))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_the_engine_failing_within_a_stream_is_an_event_and_no_done():
    engine = FakeEngine()
    service = service_of(engine)
    engine._steps = failing(engine)
    *_, last = events(ask("POST", CHAT, service, json={"messages": HELLO, "stream": True}))
    assert last["error"] == {
        "message": "the engine stopped: RuntimeError: a worker died",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    health = ask("GET", "/health", service)
    assert (health.status_code, "a worker died" in health.json()["error"]["message"]) == (503, True)


def test_the_engine_failing_within_a_plain_answer_is_500():
    engine = FakeEngine(pause=0.02)
    service = service_of(engine)
    engine._steps = failing(engine)
    answer = ask("POST", CHAT, service, json={"messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


def failing(engine):
    """Steps of which the second finds the engine failed."""

    async def steps(request):
        async for step in FakeEngine._steps(engine, request):
            yield step
            engine.failure = RuntimeError("a worker died")

    return steps
