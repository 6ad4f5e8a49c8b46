"""What generation takes and yields: sampling settings in, one step per token out.

The engine fills these; chat, generate, bench and server read them, so a number means the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from hybrid.errors import InputError

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class GenerationStats:
    """Counters of one answer up to and including the step that carries them; times are seconds of wall clock.

    `prompt_tokens` includes the `cached_tokens` whose keys and values were reused. `ttft_seconds` runs from the call to
    the first token, `decode_seconds` from the first token on. `active_share` is the mean share of the FFN neurons that
    were computed and `hot_share` the share of firings that hot neurons served, both over decode steps; None where there
    was no decode step to measure, and the latter where no GPU is used.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0
    active_share: float | None = None
    hot_share: float | None = None
    predictor_seconds: float = 0.0
    attention_seconds: float = 0.0
    ffn_seconds: float = 0.0
    head_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, over `decode_seconds`; 0 when there was no second token."""
        if self.generated_tokens < 2 or self.decode_seconds <= 0:
            return 0.0
        return (self.generated_tokens - 1) / self.decode_seconds

    def summary(self, columns: int | None = None) -> str:
        """One line for people of what was measured; the last parts are left out where it would not fit in `columns`.

        The parts: tokens, speed, time to the first token, share of neurons computed, share of firings served hot.
        """
        count, ttft, active, hot = self.generated_tokens, self.ttft_seconds, self.active_share, self.hot_share
        parts = [
            "1 token" if count == 1 else f"{count:,} tokens",
            f"{self.tokens_per_second:,.1f} tok/s" if self.tokens_per_second else "",
            f"TTFT {1000 * ttft:.0f} ms" if ttft < 10 else f"TTFT {ttft:,.1f} s",
            "" if active is None else f"active {100 * active:.1f}%",
            "" if hot is None else f"hot {100 * hot:.1f}%",
        ]
        line, *more = filter(None, parts)
        for part in more:
            if columns is not None and len(line) + len(f" | {part}") > columns:
                break
            line += f" | {part}"
        return line

    def times(self) -> str:
        """One line for people of where the time of a token went; empty where no second token was made."""
        if self.generated_tokens < 2:
            return ""
        each = 1000 / (self.generated_tokens - 1)
        return (
            f"ms/token: predictor {each * self.predictor_seconds:.1f}, attention {each * self.attention_seconds:.1f}, "
            f"FFN {each * self.ffn_seconds:.1f}, head {each * self.head_seconds:.1f}"
        )


@dataclass(frozen=True)
class GenerationStep:
    """One generated token: the `text` that became printable with it, which may be empty, and the counters so far.

    `finish` is None on every step but the last: `stop` (end token or stop string), `length` (`max_new_tokens`) or
    `context` (the KV cache is full).
    """

    text: str
    token: int
    stats: GenerationStats
    finish: FinishReason | None = None


@dataclass(frozen=True)
class _Rule:
    """How one setting is read from a user's text, which values it may have, and how an error says so.

    stored: its name in a model's generation_config.json, None where the file has no such value; absent: what a file
    means that does not name it; adapt: the file's form of a value to ours. A setting that `shapes` the choice among
    tokens is of no use to greedy.
    """

    parse: Callable[[str], Any]
    accepts: Callable[[Any], bool]
    expected: str
    stored: str | None
    absent: Any
    shapes: bool = False
    adapt: Callable[[Any], Any] = lambda value: value


def _setting(default: Any, *rule: Any, **more: Any) -> Any:
    """A field of `SamplingSettings` and its `_Rule`, without which none can be built."""
    return field(default=default, metadata={"rule": _Rule(*rule, **more)})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object, least: int) -> bool:
    # The seed and the counts go into 64-bit fields further down.
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_stop(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text and _is_unicode(text) for text in value)


def _is_unicode(text: str) -> bool:
    """False for text with half of a surrogate pair, as JSON can hold and no file can."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _stop_texts(value: object) -> object:
    """A model's file names one text or a list of them."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _parse_seed(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _parse_stop(text: str) -> tuple[str, ...]:
    if text.lower() == "none":
        return ()
    return tuple(json.loads(text)) if text.startswith("[") else (text,)


@dataclass(frozen=True)
class SamplingSettings:
    """How to pick tokens and when to end; checked when built, raising `InputError` with one line.

    Temperature 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 each switch that filter off.
    `seed` None draws a new one per answer. The text from the first `stop` string on is not shown; a list is taken too.
    """

    temperature: float = _setting(
        0.7,
        float,
        lambda v: _is_number(v) and (v == 0 or 1e-3 <= v <= 100),
        "0 (greedy), or a number from 0.001 to 100",
        stored="temperature",
        absent=1.0,
        shapes=True,
    )
    top_k: int = _setting(
        40, int, lambda v: _is_integer(v, 0), "an integer, 0 (off) or more", stored="top_k", absent=0, shapes=True
    )
    top_p: float = _setting(
        0.95,
        float,
        lambda v: _is_number(v) and 0 < v <= 1,
        "a number above 0, at most 1 (off)",
        stored="top_p",
        absent=1.0,
        shapes=True,
    )
    min_p: float = _setting(
        0.0,
        float,
        lambda v: _is_number(v) and 0 <= v < 1,
        "a number from 0 (off) to below 1",
        stored="min_p",
        absent=0.0,
        shapes=True,
    )
    repetition_penalty: float = _setting(
        1.0,
        float,
        lambda v: _is_number(v) and 0.01 <= v <= 100,
        "a number from 0.01 to 100; 1 is off",
        stored="repetition_penalty",
        absent=1.0,
    )
    seed: int | None = _setting(
        None,
        _parse_seed,
        lambda v: v is None or _is_integer(v, 0),
        "none, or an integer, 0 or more",
        stored=None,
        absent=None,
    )
    max_new_tokens: int = _setting(
        512, int, lambda v: _is_integer(v, 1), "an integer, 1 or more", stored="max_new_tokens", absent=512
    )
    stop: tuple[str, ...] = _setting(
        (),
        _parse_stop,
        _is_stop,
        'none, a string, or a JSON list of strings such as ["\\n\\n"]',
        stored="stop_strings",
        absent=(),
        adapt=_stop_texts,
    )

    def __post_init__(self) -> None:
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, rule in self._rules().items():
            value = getattr(self, name)
            if not rule.accepts(value):
                raise InputError(f"{name} is {value!r}, expected {rule.expected}")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken, so that the other filters and the seed do not matter."""
        return self.temperature == 0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The settings that `with_value` takes, in the order they are declared."""
        return tuple(cls._rules())

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> tuple[SamplingSettings, list[str]]:
        """The settings that a model's generation_config.json means, greedy unless it says `do_sample`.

        Beside them, one line for each value that cannot be used, and what is taken in its place. Those that only shape
        a choice which greedy does not make are passed over.
        """
        sampled, taken, notes = values.get("do_sample") or False, dict[str, Any](), list[str]()
        if not isinstance(sampled, bool):
            notes.append(f"do_sample is {sampled!r:.60}, expected true or false; false is taken")
            sampled = False
        for name, rule in cls._rules().items():
            value = rule.adapt(values.get(rule.stored)) if rule.stored else None
            usable = value is not None and rule.accepts(value)
            taken[name] = value if usable else rule.absent
            if value is not None and not usable and (sampled or not rule.shapes):
                notes.append(f"{rule.stored} is {value!r:.60}, expected {rule.expected}; {rule.absent!r} is taken")
        return cls(**(taken | ({} if sampled else {"temperature": 0.0}))), notes

    def with_value(self, name: str, text: str) -> SamplingSettings:
        """A copy with the setting `name` parsed from `text`, as a user types it.

        `seed` and `stop` take `none`; `stop` takes one string as it stands, or a JSON list of strings.
        Raises `InputError` for an unknown name, or a value that does not parse or is out of range.
        """
        rule = self._rules().get(name)
        if rule is None:
            raise InputError(f"unknown setting {name!r}, expected one of: {', '.join(self.names())}")
        try:
            value = rule.parse(text.strip())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is {text.strip()!r}, expected {rule.expected}") from error
        return replace(self, **{name: value})

    @classmethod
    def _rules(cls) -> dict[str, _Rule]:
        return {item.name: item.metadata["rule"] for item in fields(cls)}
