"""Sampling settings, as built and as typed by a user, and the numbers derived from the counters of an answer."""

from dataclasses import dataclass, replace

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


def test_stop_strings_may_come_as_a_list():
    assert SamplingSettings(stop=["x", "y"]).stop == ("x", "y")
    with pytest.raises(InputError, match="stop is"):
        SamplingSettings(stop=[1])


# For each setting: its name in a model's generation_config.json, a value there, and what becomes of it.
STORED = {
    "temperature": ("temperature", 0.5, 0.5),
    "top_k": ("top_k", 7, 7),
    "top_p": ("top_p", 0.5, 0.5),
    "min_p": ("min_p", 0.1, 0.1),
    "repetition_penalty": ("repetition_penalty", 1.5, 1.5),
    "seed": None,
    "max_new_tokens": ("max_new_tokens", 3, 3),
    "stop": ("stop_strings", "###", ("###",)),
}


def test_a_models_file_sets_every_setting_but_the_seed():
    assert set(STORED) == set(SamplingSettings.names())
    plain, notes = SamplingSettings.from_file({"do_sample": True, "seed": 5})
    assert notes == [] and plain == SamplingSettings(temperature=1.0, top_k=0, top_p=1.0)
    for name, (stored, value, expected) in ((name, case) for name, case in STORED.items() if case):
        found, notes = SamplingSettings.from_file({"do_sample": True, stored: value})
        assert (found, notes) == (replace(plain, **{name: expected}), [])


def test_a_setting_without_a_rule_cannot_be_forgotten():
    @dataclass(frozen=True)
    class More(SamplingSettings):
        forgotten: int = 3

    with pytest.raises(KeyError, match="rule"):
        More()


@pytest.mark.parametrize("value", ["x", None, True, [], -5])
def test_any_value_in_a_models_file_is_used_or_noted(value):
    for stored, _, _ in filter(None, STORED.values()):
        found, notes = SamplingSettings.from_file({"do_sample": True, stored: value})
        plain, _ = SamplingSettings.from_file({"do_sample": True})
        usable = value is None or (stored == "stop_strings" and value in ("x", []))
        assert (notes == []) is usable and (found == plain or usable)
        assert all(note.startswith(f"{stored} is {value!r}, expected ") and "is taken" in note for note in notes)


def test_greedy_is_temperature_zero():
    assert SamplingSettings(temperature=0).greedy
    assert not SamplingSettings(temperature=0.01).greedy


@pytest.mark.parametrize(("tokens", "seconds", "speed"), [(0, 0.0, 0.0), (1, 0.0, 0.0), (2, 0.5, 2.0), (11, 2.0, 5.0)])
def test_decode_speed_counts_the_tokens_after_the_first(tokens, seconds, speed):
    stats = GenerationStats(prompt_tokens=3, generated_tokens=tokens, decode_seconds=seconds)
    assert stats.tokens_per_second == speed


STATS = GenerationStats(9, 4, 11, 0.25, 2.0, 0.125, 0.75, 0.1, 0.2, 0.3, 0.4)


def test_the_summary_names_every_number_and_leaves_out_what_was_not_measured():
    assert STATS.summary() == "11 tokens | 5.0 tok/s | TTFT 250 ms | active 12.5% | hot 75.0%"
    assert GenerationStats(prompt_tokens=9, generated_tokens=1, ttft_seconds=0.03).summary() == "1 token | TTFT 30 ms"


def test_the_summary_of_a_long_answer_fits_a_window_of_80_columns():
    slow = GenerationStats(10**6, 0, 123_456, 4321.0, 41.0, 1.0, 1.0)
    assert slow.summary() == "123,456 tokens | 3,011.1 tok/s | TTFT 4,321.0 s | active 100.0% | hot 100.0%"
    assert len(slow.summary()) <= 80


@pytest.mark.parametrize(
    ("columns", "last"),
    [
        (62, "hot 75.0%"),
        (61, "active 12.5%"),
        (50, "active 12.5%"),
        (49, "TTFT 250 ms"),
        (40, "TTFT 250 ms"),
        (5, "11 tokens"),
    ],
)
def test_the_summary_leaves_out_what_does_not_fit_in_the_window(columns, last):
    whole = STATS.summary()
    assert STATS.summary(columns) == whole[: whole.index(last) + len(last)]


def test_the_times_are_those_of_one_token_after_the_first():
    assert STATS.times() == "ms/token: predictor 10.0, attention 20.0, FFN 30.0, head 40.0"
    assert GenerationStats(prompt_tokens=9, generated_tokens=1).times() == ""
