"""What is asked of a serving engine, and what comes back: the words that the scheduler, `AsyncEngine` and the server
share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybrid.errors import InputError
from hybrid.generation import GenerationStep, SamplingSettings

MOST_LOGPROBS = 20  # beside the token that was taken
_MOST_PENALTY, _MOST_BIAS = 2.0, 100.0


class Constraint(Protocol):
    """What an answer must look like, token by token. Used from one thread at a time."""

    def allowed(self) -> Any:
        """A mask bool [vocab], NumPy, of the tokens that may come next."""

    def accept(self, token: int) -> None:
        """`token` came next."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted; checked when built.

    prompt: token ids. settings: sampling, stop strings and the most new tokens. frequency_penalty, presence_penalty:
    taken off the logits of tokens that the answer has already, by their number or once, -2 to 2. logit_bias: added to
    tokens' logits, -100 to 100. top_logprobs: how many of the likeliest tokens to report beside each one taken, None
    for no log-probabilities at all. constraint: what the answer must look like. deadline: seconds from its arrival
    after which it is cancelled.
    """

    prompt: tuple[int, ...]
    settings: SamplingSettings
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, value, most in (
            ("frequency_penalty", self.frequency_penalty, _MOST_PENALTY),
            ("presence_penalty", self.presence_penalty, _MOST_PENALTY),
            *((f"logit_bias of {token}", bias, _MOST_BIAS) for token, bias in self.logit_bias.items()),
        ):
            if not math.isfinite(value) or abs(value) > most:
                raise InputError(f"{name} is {value}, expected -{most:g} to {most:g}")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_LOGPROBS:
            raise InputError(f"top_logprobs is {self.top_logprobs}, expected 0 to {MOST_LOGPROBS}")
        if self.deadline is not None and not self.deadline > 0:
            raise InputError(f"deadline is {self.deadline} seconds, expected more than 0")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability before temperature, and the likeliest tokens in its place, most likely first.

    logprob is None for a prompt's first token, which nothing comes before.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ServedStep:
    """One token of an answer; logprob where the request asks for it."""

    step: GenerationStep
    logprob: TokenLogprob | None = None


class QueueFullError(Exception):
    """Too many requests wait already; come back after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class EngineStoppedError(Exception):
    """The engine takes or finishes no more answers; its text says why."""


class DeadlineError(Exception):
    """A request was not finished by its deadline."""
