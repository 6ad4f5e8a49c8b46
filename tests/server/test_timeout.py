"""`timeout`: an answer that is not finished by then ends in an error, with a status where nothing was sent."""

import pytest
from fake_engine import FakeEngine
from server_cases import CHAT, HELLO, events, post, running, service_of

BODIES = {
    CHAT: {"messages": HELLO},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 9},
}
SAID = {"message": "not finished within 0.025 s, its deadline", "type": "timeout_error"}
every = pytest.mark.parametrize("path", BODIES)


def slow():
    """Three tokens and an end, 10 ms apart: 0.025 s allow two of them."""
    return FakeEngine("one two three", pause=0.01)


@every
@pytest.mark.parametrize("seconds", [0.5, 86400])
def test_it_is_the_requests_deadline(path, seconds):
    engine = FakeEngine()
    assert post(path, BODIES[path] | {"timeout": seconds}, engine).status_code == 200
    assert post(path, BODIES[path] | {"timeout": None}, engine).status_code == 200
    assert [request.deadline for request in engine.requests] == [seconds, None]


@every
def test_a_whole_answer_that_is_late_is_408(path):
    answer = post(path, BODIES[path] | {"timeout": 0.025}, slow())
    error = answer.json()["error"]
    assert answer.status_code == 408 and {name: error[name] for name in SAID} == SAID
    assert path == "/v1/messages" or (error["param"], error["code"]) == ("timeout", "timeout")


@every
def test_a_stream_of_which_nothing_came_is_408(path):
    answer = post(path, BODIES[path] | {"timeout": 0.005, "stream": True}, slow())
    assert answer.status_code == 408 and answer.json()["error"]["type"] == "timeout_error"


@every
def test_a_stream_ends_in_an_error(path):
    engine = slow()
    answer = post(path, BODIES[path] | {"timeout": 0.025, "stream": True}, engine)
    found = events(answer)
    last = found[-1]["response"] if path == "/v1/responses" else found[-1]
    assert answer.status_code == 200 and "two" in answer.text and "three" not in answer.text
    assert last["error"]["message"] == SAID["message"] and "[DONE]" not in found
    assert (engine.open, engine.finished) == (0, 0)


def test_all_answers_of_a_request_end_together():
    engine = slow()
    assert post(CHAT, {"messages": HELLO, "n": 3, "timeout": 0.025}, engine).status_code == 408
    assert [request.deadline for request in engine.requests] == [0.025] * 3 and engine.open == 0


def test_scoring_a_prompt_takes_of_the_same_time():
    body = {"prompt": "hello there", "echo": True, "logprobs": 1}
    engine = FakeEngine("one", pause=0.02)
    assert post("/v1/completions", body | {"timeout": 0.01, "max_tokens": 0}, engine).status_code == 408
    assert post("/v1/completions", body | {"timeout": 10}, engine).status_code == 200
    assert 9 < engine.requests[0].deadline <= 9.99


@every
@pytest.mark.parametrize("seconds", [0, -1, 86401, "5", True])
def test_what_is_no_time_is_refused(path, seconds):
    answer = post(path, BODIES[path] | {"timeout": seconds})
    assert answer.status_code == 400 and "timeout: " in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_clients_do_not_ask_again(kind):
    package = pytest.importorskip(kind, reason=f"{kind} is not installed: pip install -e .[clients]")
    engine, is_openai = slow(), kind == "openai"
    make = package.OpenAI if is_openai else package.Anthropic
    with running(service_of(engine)) as url, make(base_url=f"{url}/v1" * is_openai or url, api_key="x") as client:
        create = client.chat.completions.create if is_openai else client.messages.create
        with pytest.raises(package.APIStatusError, match=r"within 0\.025 s") as end:
            create(model="any", messages=HELLO, max_tokens=9, extra_body={"timeout": 0.025})
    assert end.value.status_code == 408 and len(engine.requests) == 1
