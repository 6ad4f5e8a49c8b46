"""`POST /v1/completions`: prompts of every form, echo, scores."""

import pytest
from fake_engine import FakeEngine
from server_cases import events, post

URL = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", [[263, 293, 84]]),
        (["hello", "hello there"], [[263, 293, 84], [263, 293, 84, 486]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_a_prompt_is_text_or_tokens_or_several(prompt, prompts):
    engine = FakeEngine("one two three")
    answer = post(URL, {"prompt": prompt}, engine).json()
    assert [list(request.prompt) for request in engine.requests] == prompts
    assert [choice["text"] for choice in answer["choices"]] == ["one two three"] * len(prompts)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 4 * len(prompts)
    assert (answer["object"], engine.requests[0].settings.max_new_tokens) == ("text_completion", 16)


def test_answers_of_each_prompt_are_side_by_side():
    engine = FakeEngine()
    answer = post(URL, {"prompt": ["a", "b"], "n": 2, "echo": True, "seed": 1}, engine).json()
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "b", "b"]
    assert sorted((request.prompt, request.settings.seed) for request in engine.requests) == [
        (tuple(engine.codec.encode(text)), seed) for text in "ab" for seed in (1, 2)
    ]


@pytest.mark.parametrize("most", [0, 1])
def test_echo_with_scores_is_what_harnesses_read(most):
    engine = FakeEngine("one two three")
    body = {"prompt": "hello there", "max_tokens": most, "echo": True, "logprobs": 1}
    answer = post(URL, body, engine).json()
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    pieces = ["he", "ll", "o", " there"] + ["one"] * most
    assert choice["text"] == "hello there" + "one" * most
    assert found["tokens"] == pieces
    assert found["token_logprobs"] == [None, -0.25, -0.25, -0.25] + [-0.25] * most
    assert found["text_offset"] == [0, 2, 4, 5, 11][: len(pieces)]
    assert found["top_logprobs"][:2] == [None, {"bytes:\\xa1": -0.5, "ll": -0.25}]
    assert choice["finish_reason"] == "length"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, most)
    assert len(engine.requests) == most


def test_a_stream():
    body = {"prompt": "hello", "stream": True, "stream_options": {"include_usage": True}, "echo": True, "logprobs": 0}
    *chunks, last, done = events(post(URL, body))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts == ["helloone", " two", " three", ""]
    assert [offset for c in chunks for offset in c["choices"][0]["logprobs"]["text_offset"]] == [0, 2, 4, 5, 8, 12, 18]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert (last["usage"]["total_tokens"], last["choices"], done) == (7, [], "[DONE]")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0, "echo": True, "stream": True}, "stream"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(body, param):
    answer = post(URL, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
