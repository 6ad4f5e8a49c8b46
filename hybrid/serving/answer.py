"""`Answer`: one request's way through the scheduler, and the events that its caller hears of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid.generation import FinishReason
from hybrid.model.ffn import FFNCounters
from hybrid.model.kv_cache import KVCache
from hybrid.serving.choice import RowChoice
from hybrid.serving.request import Request, TokenLogprob


@dataclass(eq=False)
class Answer:
    """A request, its KV cache, and what came of it so far. Made by a caller, then the scheduler's alone.

    ends: tokens that end it. arrived: by the scheduler's clock. top: where the prompt is only to be scored, how many of
    the likeliest tokens to report beside each of it; None for an answer. tokens: prompt and answer so far. cached: of
    the prompt, those that were known when it was first read. scores: of the prompt's tokens. first and before: when
    the first token came, and the counters of all steps before it.
    """

    request: Request
    ends: frozenset[int]
    cache: KVCache
    arrived: float
    top: int | None = None
    tokens: list[int] = field(init=False)
    choice: RowChoice = field(init=False)
    cached: int | None = None
    scores: list[TokenLogprob] = field(default_factory=list)
    admitted: float = 0.0
    first: float = 0.0
    before: FFNCounters = field(default_factory=FFNCounters)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.choice = RowChoice(self.request, self.tokens)

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def to_read(self) -> int:
        """Tokens that the cache must hold before the next step: the prompt; of one that was set back, all but the
        last, which is the next step's."""
        return len(self.tokens) - (self.generated > 0)

    @property
    def deadline(self) -> float | None:
        """When it is given up."""
        return None if self.request.deadline is None else self.arrived + self.request.deadline

    def finish(self) -> FinishReason | None:
        """Why no token follows the last one, if so."""
        if self.tokens[-1] in self.ends:
            return "stop"
        if self.generated >= self.request.settings.max_new_tokens:
            return "length"
        return "context" if len(self.tokens) >= self.cache.capacity else None


@dataclass(frozen=True)
class Produced:
    """One token of an answer, its `generated`th; time: when; counters: of all decode steps up to it."""

    answer: Answer
    token: int
    generated: int
    finish: FinishReason | None
    time: float
    counters: FFNCounters
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Ended:
    """No token comes any more: the prompt was scored, or `error` says why there is no more."""

    answer: Answer
    error: Exception | None = None


Event = Produced | Ended
