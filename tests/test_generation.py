"""Sampling settings, as built and as typed by a user, and the numbers derived from the counters of an answer."""

import pytest

from hybrid.errors import InputError
from hybrid.generation import GenerationStats, SamplingSettings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("top_k", " 12 ", 12),
        ("top_p", "1", 1.0),
        ("min_p", "0.05", 0.05),
        ("repetition_penalty", "1.1", 1.1),
        ("seed", "7", 7),
        ("seed", "None", None),
        ("max_new_tokens", "1", 1),
        ("stop", "User:", ("User:",)),
        ("stop", '["\\n\\n", "###"]', ("\n\n", "###")),
        ("stop", "none", ()),
    ],
)
def test_with_value_parses_what_a_user_types(name, text, value):
    before = SamplingSettings(seed=1, stop=("x",))
    after = before.with_value(name, text)
    assert getattr(after, name) == value
    others = [other for other in SamplingSettings.names() if other != name]
    assert [getattr(after, other) for other in others] == [getattr(before, other) for other in others]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "hot"),
        ("temperature", "-0.1"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("top_k", "1.5"),
        ("top_k", "-1"),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("min_p", "1"),
        ("repetition_penalty", "0"),
        ("seed", "-1"),
        ("seed", str(2**63)),
        ("max_new_tokens", "0"),
        ("stop", ""),
        ("stop", "["),
        ("stop", "[1]"),
        ("stop", "[" * 100_000),
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_the_setting(name, text):
    with pytest.raises(InputError) as caught:
        SamplingSettings().with_value(name, text)
    assert str(caught.value).startswith(f"{name} is ")
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown setting 'topk', expected one of: temperature, top_k"):
        SamplingSettings().with_value("topk", "3")


@pytest.mark.parametrize(
    "values",
    [{"temperature": "hot"}, {"top_p": None}, {"top_k": True}, {"seed": 1.0}, {"stop": "text"}, {"stop": ("",)}],
)
def test_wrong_types_are_refused_when_built(values):
    with pytest.raises(InputError, match="expected"):
        SamplingSettings(**values)


def test_greedy_is_temperature_zero():
    assert SamplingSettings(temperature=0).greedy
    assert not SamplingSettings(temperature=0.01).greedy


@pytest.mark.parametrize(("tokens", "seconds", "speed"), [(0, 0.0, 0.0), (1, 0.0, 0.0), (2, 0.5, 2.0), (11, 2.0, 5.0)])
def test_decode_speed_counts_the_tokens_after_the_first(tokens, seconds, speed):
    stats = GenerationStats(prompt_tokens=3, generated_tokens=tokens, decode_seconds=seconds)
    assert stats.tokens_per_second == speed


def test_the_summary_names_every_number_and_leaves_out_what_was_not_measured():
    stats = GenerationStats(9, 4, 11, 0.25, 2.0, 0.125, 0.75, 0.1, 0.2, 0.3)
    for part in ("11 tokens", "5.0 tok/s", "TTFT 250 ms", "12.5%", "75.0%", "predictor 10.0", "FFN 30.0"):
        assert part in stats.summary()
    assert "hot" not in GenerationStats(prompt_tokens=9, generated_tokens=1).summary()
