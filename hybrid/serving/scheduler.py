"""`Scheduler`: which tokens a step computes, of which requests, in which KV blocks. Plain and deterministic: it has no
thread and reads time from the clock that it is given.

A round decodes one token of every running answer, as many rows a step as the runner takes, then reads pieces of the
waiting prompts, one prompt at a time (Orca, OSDI '22: requests join and leave between steps; Sarathi-Serve, arXiv
2403.02310: prompts in pieces), for as long as what a step leaves of `max_pause` allows, by measurement, and at least 8
tokens; where nobody decodes one piece of the runner's chunk.

Who waits how long: first come, first served, and nobody overtakes. Whoever waits does so only for those that came
before, and each of these ends, with every token that it may have at most, after `max_new_tokens` steps and its prompt's
pieces. A prompt of n tokens that is being read is there after at most n / 8 rounds.

Blocks: a prompt is read once there are blocks for all of it and one for each running answer, an answer takes one block
after another. Where there is none, first what nobody uses of the prefixes goes, then the prompt that is being read is
set back, then the youngest of the running: its blocks stay as a prefix until they are wanted, and what is lost of them
is computed again later, the prompt as prompts are, the answer as steps are, from the tokens that it has. So no answer
depends on what ran beside it, but for rounding where a prompt's pieces have other lengths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Protocol

import torch

from hybrid.errors import ContextError
from hybrid.model.ffn import FFNCounters
from hybrid.model.kv_cache import KVPool, Row
from hybrid.runtime.runner import Runner
from hybrid.serving.answer import Answer, Ended, Event, Produced
from hybrid.serving.choice import token_logprob
from hybrid.serving.config import ServingConfig
from hybrid.serving.pieces import PieceLengths
from hybrid.serving.prefixes import PrefixTree
from hybrid.serving.request import DeadlineError, QueueFullError, TokenLogprob

_PAUSE_SHARE = 0.5  # of the longest pause, that a piece has at least, however long a step is
_SCORED_AT_ONCE = 256  # tokens, as each has logits for a whole vocabulary


class Meter(Protocol):
    """Where a runner counts; `FFNRuntime` is one."""

    counters: FFNCounters


@dataclass
class Tally:
    """Sums since the start."""

    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    requests: int = 0
    cancelled: int = 0
    preempted: int = 0
    longest_pause_seconds: float = 0.0


class Scheduler:
    """The answers of one runner and one pool. Used from one thread; its counts may be read from others.

    waiting: they have no blocks. reading: the one whose prompt is being read. running: oldest first.
    """

    def __init__(
        self,
        runner: Runner,
        pool: KVPool,
        config: ServingConfig,
        meter: Meter,
        clock: Callable[[], float] = perf_counter,
        prefix_limit: int | None = None,
    ) -> None:
        """prefix_limit: see `PrefixTree`."""
        self._runner, self._pool, self._config, self._meter, self._clock = runner, pool, config, meter, clock
        self.waiting, self.running = deque[Answer](), list[Answer]()
        self.reading: Answer | None = None
        self.tree = PrefixTree(pool, prefix_limit)
        self.tally, self.counters = Tally(), FFNCounters()
        self._pieces = PieceLengths(runner.chunk)
        self._step_seconds = 0.0  # of the last step of all that run
        self._seconds = 1.0  # that an answer ran, on the mean of the last ones

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self.reading)

    def answers(self) -> list[Answer]:
        """All that have not ended."""
        return [*self.running, *([self.reading] if self.reading else []), *self.waiting]

    def add(self, answer: Answer) -> None:
        """Let it wait for its turn. Raises `QueueFullError`, and `ContextError` where its prompt can never fit."""
        if len(answer.prompt) >= answer.cache.capacity or answer.cache.missing(len(answer.prompt)) > self._pool.blocks:
            raise ContextError(
                f"prompt of {len(answer.prompt)} tokens can never fit: sequences have {answer.cache.capacity} tokens, "
                f"all together {self._pool.blocks * self._pool.block_size}; shorten it, or raise the KV tokens"
            )
        if len(self.waiting) >= self._config.max_waiting:
            places = max(1, self._config.max_running)
            raise QueueFullError(len(self.waiting), max(1.0, len(self.waiting) * self._seconds / places))
        self.tally.requests += 1
        self.waiting.append(answer)

    def cancel(self, answer: Answer) -> None:
        """Give it up and its blocks back; nothing where it has ended."""
        if answer in self.answers():
            self.tally.cancelled += 1
            self._remove(answer)

    def step(self) -> list[Event]:
        """One round: `decode`, then `read`."""
        return self.decode() + self.read()

    def decode(self) -> list[Event]:
        """One more token of every running answer."""
        events = self._expired()
        self._make_room()
        running, most = list(self.running), min(self._runner.most_rows, self._config.max_running)
        started = self._clock()
        for at in range(0, len(running), most):
            group = running[at : at + most]
            self._meter.counters = FFNCounters()
            rows = [Row(answer.cache, answer.tokens[-1]) for answer in group]
            tokens = self._runner.next_tokens(rows, [answer.choice for answer in group])
            self.counters = _sum(self.counters, self._meter.counters)
            self.tally.steps, self.tally.rows = self.tally.steps + 1, self.tally.rows + len(group)
            events += [self._took(answer, token) for answer, token in zip(group, tokens, strict=True)]
        self._step_seconds = self._clock() - started if running else 0.0
        self.tally.generated_seconds += self._step_seconds
        return events

    def read(self) -> list[Event]:
        """Pieces of the prompts whose turn it is, for as long as those that decode may wait."""
        events, started, alone = list[Event](), self._clock(), not self.running
        pause = self._config.max_pause
        budget = float("inf") if alone else max(pause - self._step_seconds, _PAUSE_SHARE * pause)
        left, begun = budget, False
        while not begun or (not alone and self._pieces.fits(left)):
            self.reading = answer = self.reading or self._admitted()
            if answer is None:
                break
            events += self._piece(answer, left, alone)
            left, begun = budget - (self._clock() - started), True
        if begun and not alone:
            self.tally.longest_pause_seconds = max(self.tally.longest_pause_seconds, self._clock() - started)
        return events

    def _piece(self, answer: Answer, budget: float, alone: bool) -> list[Event]:
        """One piece of a prompt, in `budget` seconds where not `alone`."""
        if answer.cache.length == answer.to_read:  # set back, and all of it was still there
            return self._join(answer, None)
        most = self._runner.chunk if alone else self._pieces.most(budget)
        at, started = answer.cache.length, self._clock()
        logits = self._read(answer, most)
        seconds, count = self._clock() - started, answer.cache.length - at
        self._pieces.note(count, seconds, budget)
        self.tally.prompt_tokens, self.tally.prompt_seconds = (
            self.tally.prompt_tokens + count,
            self.tally.prompt_seconds + seconds,
        )
        return self._join(answer, logits) if answer.cache.length == answer.to_read else []

    def _read(self, answer: Answer, most: int) -> torch.Tensor | None:
        """Read at most so many more tokens; the logits after them where they are the prompt's."""
        cache, prompt, at = answer.cache, answer.prompt, answer.cache.length
        if at >= len(prompt):  # what was answered already, as it was computed then
            again = answer.tokens[at : min(at + min(most, self._runner.most_rows), answer.to_read)]
            self._runner.decode([Row(cache, token) for token in again])
            return None
        if answer.top is None:
            return self._runner.read(prompt[at : at + most], len(prompt), cache)
        piece = prompt[at : at + min(most, _SCORED_AT_ONCE)]
        logits = self._runner.score(piece, len(prompt), cache)
        answer.scores += [] if at else [TokenLogprob(prompt[0], None)]
        following = prompt[at + 1 : at + 1 + len(piece)]
        answer.scores += [token_logprob(row, token, answer.top) for row, token in zip(logits, following, strict=False)]
        return None

    def _join(self, answer: Answer, logits: torch.Tensor | None) -> list[Event]:
        """What was read is known from now on; the answer runs."""
        self.reading = None
        self._keep(answer)
        if answer.top is not None:
            self._remove(answer)
            return [Ended(answer)]
        self.running.append(answer)
        if answer.generated or logits is None:
            return []
        return [self._took(answer, answer.choice.pick(logits))]

    def _took(self, answer: Answer, token: int) -> Event:
        now, failure = self._clock(), answer.choice.failure
        if failure is not None:
            self._remove(answer)
            return Ended(answer, failure)
        answer.tokens.append(token)
        self.tally.generated_tokens += 1
        if answer.generated == 1:
            answer.first, answer.before = now, self.counters
        finish = answer.finish()
        if finish:
            self._seconds += (now - answer.admitted - self._seconds) / 8
            self._remove(answer)
        return Produced(answer, token, answer.generated, finish, now, self.counters, answer.choice.logprob)

    def _admitted(self) -> Answer | None:
        """The first of those that wait, with blocks for its prompt; None where it must wait on."""
        if not self.waiting or len(self.running) >= self._config.max_running:
            return None
        answer = self.waiting[0]
        most = answer.to_read if answer.generated else len(answer.prompt) - 1  # a first token needs logits
        wanted = self._config.reuse_prefixes and answer.top is None
        known = self.tree.match(answer.tokens, most, len(answer.prompt)) if wanted else []
        answer.cache.begin_with(known)
        missing = answer.cache.missing(answer.to_read)
        if not self._free(missing + len(self.running)) or not answer.cache.reserve(answer.to_read):
            answer.cache.release()
            return None
        if answer.cached is None:
            answer.cached, answer.admitted = answer.cache.length, self._clock()
            self.tally.prefix_hit_tokens += answer.cached
        return self.waiting.popleft()

    def _make_room(self) -> None:
        """Blocks for one more token of each running answer, by setting back the youngest where there are too few."""
        for answer in list(self.running):
            while answer in self.running and not self._has_room(answer):
                youngest = self.reading or self.running[-1]
                self.tally.preempted += youngest is not self.reading
                self._remove(youngest)
                self.waiting.appendleft(youngest)

    def _has_room(self, answer: Answer) -> bool:
        cache = answer.cache
        return self._free(cache.missing(cache.length + 1)) and cache.reserve(cache.length + 1)

    def _free(self, count: int) -> bool:
        """Whether so many blocks are free, once those prefixes are given up that it takes."""
        lacking = count - self._pool.free
        return lacking <= 0 or self.tree.evict(lacking)

    def _remove(self, answer: Answer) -> None:
        """Take it out, with its blocks."""
        if answer is self.reading:
            self.reading = None
        elif answer in self.running:
            self.running.remove(answer)
        elif answer in self.waiting:
            self.waiting.remove(answer)
        self._keep(answer)
        answer.cache.release()

    def _keep(self, answer: Answer) -> None:
        if self._config.reuse_prefixes:
            self.tree.insert(answer.tokens[: answer.cache.length], answer.cache.blocks, len(answer.prompt))

    def _expired(self) -> list[Event]:
        now = self._clock()
        late = [answer for answer in self.answers() if answer.deadline is not None and now >= answer.deadline]
        for answer in late:
            self.cancel(answer)
        return [
            Ended(answer, DeadlineError(f"not finished within {answer.request.deadline:g} s, its deadline"))
            for answer in late
        ]


def _sum(a: FFNCounters, b: FFNCounters) -> FFNCounters:
    return FFNCounters(*(getattr(a, field.name) + getattr(b, field.name) for field in fields(FFNCounters)))
