"""A runner for tests of the scheduler: its "model" is a function of all tokens that a sequence's KV blocks hold, so
that a block that is wrong, lost or written by another changes the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from placement_cases import small_spec

from hybrid import Request, SamplingSettings, ServingConfig
from hybrid.model.ffn import FFNCounters
from hybrid.model.kv_cache import KVCache, KVPool, Row
from hybrid.runtime.sampling import Choice, most_likely
from hybrid.serving.answer import Answer, Ended, Event, Produced
from hybrid.serving.choice import RowChoice
from hybrid.serving.request import TokenLogprob
from hybrid.serving.scheduler import Scheduler

VOCAB, BLOCK = 61, 4
SPEC = small_spec(dtype="f32", vocab_size=VOCAB, max_context=1024)
GREEDY = SamplingSettings(temperature=0, max_new_tokens=8)


class Clock:
    """Time that goes on only where a test or a runner says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Writes tokens as keys into the blocks of a sequence and reads them back. Its steps and pieces take the seconds
    that `step_seconds` and `read_seconds` say."""

    notices: tuple[str, ...] = ()

    def __init__(self, clock: Clock | None = None, most_rows: int = 4, chunk: int = 32) -> None:
        self.chunk, self.most_rows, self.clock, self.counters = chunk, most_rows, clock or Clock(), FFNCounters()
        self.step_seconds, self.read_seconds = 0.01, lambda tokens: 0.001 * tokens
        self.steps: list[int] = []  # rows of each
        self.pieces: list[tuple[int, ...]] = []
        self.rested = 0

    def load_kernels(self) -> None:
        """Nothing to load."""

    def rest(self) -> None:
        self.rested += 1

    def read(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        return self.score(tokens, length, cache)[-1]

    def score(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        self.pieces.append(tuple(tokens))
        self.clock.now += self.read_seconds(len(tokens))
        return torch.stack([self._after(cache, token) for token in tokens])

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        assert 1 <= len(rows) <= self.most_rows
        self.steps.append(len(rows))
        self.clock.now += self.step_seconds
        self.counters.neurons, self.counters.computed = 10 * len(rows), 4 * len(rows)
        return torch.stack([self._after(row.cache, row.token) for row in rows])

    def next_tokens(self, rows: Sequence[Row], choices: Sequence[Choice]) -> list[int]:
        return [
            most_likely(logits) if choice.takes_largest else choice.pick(logits)
            for logits, choice in zip(self.decode(rows), choices, strict=True)
        ]

    def _after(self, cache: KVCache, token: int) -> torch.Tensor:
        number, at = divmod(cache.length, cache.block_size)
        assert number < len(cache.blocks), "no block was reserved"
        assert cache.pool.references(cache.blocks[number]) == 1, "a block that others use is written"
        cache.data[0, cache.blocks[number], 0, 0, at, 0] = token
        cache.advance(1)
        held = cache.data[0, list(cache.blocks), 0, 0, :, 0].reshape(-1)[: cache.length]
        return logits_after(held.astype(int).tolist())


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """The model: any logits, the same for the same tokens."""
    seed = 7
    for token in tokens:
        seed = (seed * 31 + token + 1) % (2**31 - 1)
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def answer_alone(request: Request) -> list[int]:
    """What a request is answered where nothing is shared, set back or read in pieces."""
    seen = list(request.prompt)
    choice = RowChoice(request, seen)
    for _ in range(request.settings.max_new_tokens):
        seen.append(choice.pick(logits_after(seen)))
    return seen[len(request.prompt) :]


def scores_alone(prompt: Sequence[int]) -> list[float]:
    """Log-probabilities of a prompt's tokens from the second on."""
    after = [logits_after(prompt[:end]).log_softmax(0) for end in range(1, len(prompt))]
    return [float(logits[token]) for logits, (_, token) in zip(after, pairwise(prompt), strict=True)]


class Served:
    """A scheduler over a pool of `blocks` blocks, and what came of each request."""

    def __init__(
        self, blocks: int = 32, config: ServingConfig | None = None, capacity: int = 64, **runner: int
    ) -> None:
        self.clock = Clock()
        self.runner = FakeRunner(self.clock, **runner)
        self.pool, self.capacity = KVPool(SPEC, blocks * BLOCK, BLOCK), min(capacity, blocks * BLOCK)
        self.config = config or ServingConfig()
        self.scheduler = Scheduler(self.runner, self.pool, self.config, self.runner, self.clock)
        self.tokens: dict[Answer, list[int]] = {}
        self.ends: dict[Answer, str | Exception | list[TokenLogprob] | None] = {}

    def add(self, request: Request, top: int | None = None, ends: frozenset[int] = frozenset()) -> Answer:
        cache = KVCache(SPEC, self.capacity, self.pool)
        answer = Answer(request, ends, cache, self.clock(), top)
        self.scheduler.add(answer)
        self.tokens[answer] = []
        return answer

    def step(self, each: Callable[[Event], None] = lambda event: None) -> None:
        for event in self.scheduler.step():
            each(event)
            assert event.answer not in self.ends, "an event after the end"
            if isinstance(event, Produced):
                self.tokens[event.answer].append(event.token)
                assert event.generated == len(self.tokens[event.answer])
                if event.finish:
                    self.ends[event.answer] = event.finish
            elif isinstance(event, Ended):
                self.ends[event.answer] = event.error

    def run(self, rounds: int = 2000) -> None:
        """Until nothing is left to do."""
        for _ in range(rounds):
            if not self.scheduler.busy:
                return
            self.step()
        raise AssertionError(f"still busy after {rounds} rounds")

    def check_blocks(self) -> None:
        """Nothing runs, so all blocks are free but those of the tree, which can all be had."""
        assert not self.scheduler.busy
        assert self.pool.free + self.scheduler.tree.blocks == self.pool.blocks
        assert self.scheduler.tree.idle() == self.scheduler.tree.blocks
        assert self.scheduler.tree.evict(self.scheduler.tree.blocks) and self.pool.free == self.pool.blocks


def request(prompt: Sequence[int], tokens: int = 8, **more: object) -> Request:
    """A greedy one, unless `settings` are given."""
    settings = more.pop("settings", None) or SamplingSettings(temperature=0, max_new_tokens=tokens)
    return Request(tuple(prompt), settings, **more)
