"""Health, models, properties, metrics, tokens and text; the bytes of single tokens."""

import pytest
from fake_engine import FakeEngine
from server_cases import ask, post

from hybrid.server.token_text import TokenTexts


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health(path):
    answer = ask("GET", path)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_models():
    (model,) = ask("GET", "/v1/models").json()["data"]
    assert (model["id"], model["object"], model["meta"]) == ("fake", "model", {"n_vocab": 8192, "n_ctx": 1024})
    assert ask("GET", "/v1/models/fake").json()["id"] == "fake"
    other = ask("GET", "/v1/models/some/other")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


def test_props_name_no_path():
    props = ask("GET", "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert props["default_generation_settings"]["params"]["temperature"] == 0
    assert (props["model_path"], props["total_slots"], props["bos_token"]) == ("fake", 32, "<|bos|>")
    assert "add_generation_prompt" in props["chat_template"]


def test_metrics():
    answer = ask("GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert lines["llamacpp:tokens_predicted_total"] == "42.0"
    assert lines["hybrid:prefix_hit_tokens_total"] == "7.0"
    assert lines["hybrid:hot_share"] == "0.75"
    assert "hybrid:active_share" not in lines  # nothing was measured yet


def test_tokens_and_text():
    answer = post("/tokenize", {"content": "hello there"}).json()
    assert answer == {"tokens": [263, 293, 84, 486]}
    assert post("/detokenize", answer).json() == {"content": "hello there"}
    pieces = post("/tokenize", {"content": "hello", "with_pieces": True}).json()["tokens"]
    assert [piece["piece"] for piece in pieces] == ["he", "ll", "o"]


@pytest.mark.parametrize("tokens", [[8192], [-1], ["1"], [True]])
def test_what_is_no_token(tokens):
    answer = post("/detokenize", {"tokens": tokens})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tokens")


@pytest.mark.parametrize("text", ["hello", "\u00e9t\u00e9 \u65e5\u672c", "a\n\tb", "\U0001f600"])
def test_tokens_bytes_are_the_texts_bytes(text):
    codec = FakeEngine().codec
    assert b"".join(TokenTexts(codec).bytes_of(token) for token in codec.encode(text)) == text.encode()


def test_a_part_of_a_character_is_written_as_its_bytes():
    codec = FakeEngine().codec
    (first, *_) = codec.encode("\U0001f600")
    assert TokenTexts(codec).text_of(first) == "bytes:\\xf0"
    assert TokenTexts(codec).text_of(1) == "<|eos|>"
