"""`hybrid generate` over a fake model: the text alone on one stream, how it ended and how fast it was on the other."""

import io
from functools import partial

import pytest
from fake_chat import FakeModel

from hybrid.chat.continuation import show_continuation
from hybrid.chat.screen import Screen
from hybrid.errors import HybridError
from hybrid.generation import SamplingSettings

SPEED = " tokens | 2.0 tok/s | TTFT 250 ms | active 12.5% | hot 75.0%"


def continued(question: str, context: int = 1000, **settings: int) -> tuple[str, list[str]]:
    """Text and the lines beside it."""
    out, err, sampling = io.StringIO(), io.StringIO(), SamplingSettings(**settings)
    reply = partial(FakeModel(context).reply, [{"role": "user", "content": question}], sampling)
    show_continuation(reply, sampling, context, Screen(out, {}), Screen(err, {}))
    return out.getvalue(), err.getvalue().splitlines()


def test_the_text_and_beside_it_counters_and_times():
    text, lines = continued("a b c")
    assert text == "echo: a b c\n"
    assert lines == ["4" + SPEED, "ms/token: predictor 33.3, attention 66.7, FFN 100.0, head 0.0"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"context": 10}, "the context of 10 tokens is full"), ({"max_new_tokens": 4}, "max_new_tokens is 4")],
)
def test_a_text_that_something_else_than_the_model_ends_says_so(settings, why):
    text, lines = continued("a b c d e", **settings)
    assert text == "echo: a b c\n"
    assert lines[:2] == [f"the answer ends here: {why}", "4" + SPEED]


def test_an_empty_text_says_so():
    assert continued("silent") == (
        "\n",
        ["the continuation is empty", "1 token | TTFT 250 ms | active 12.5% | hot 75.0%"],
    )


@pytest.mark.parametrize(("question", "text"), [("interrupt", "echo: interrupt\n"), ("hang", ""), ("fail", "echo:\n")])
def test_a_line_that_was_begun_is_ended_whatever_ends_the_text(question, text):
    out, err, sampling = io.StringIO(), io.StringIO(), SamplingSettings()
    reply = partial(FakeModel().reply, [{"role": "user", "content": question}], sampling)
    with pytest.raises((KeyboardInterrupt, HybridError)):
        show_continuation(reply, sampling, 1000, Screen(out, {}), Screen(err, {}))
    assert (out.getvalue(), err.getvalue()) == (text, "")
