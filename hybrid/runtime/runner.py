"""`Runner`: what an engine lets read prompts and decode tokens. One for the CPU alone, one for GPU and CPU together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cpu_kernels.contract import MAX_BATCH
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.transformer import Transformer
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.sampling import Choice, most_likely
from profiler.common.openmp import torch_threads
from profiler.common.spec import Strategy


class Runner(Protocol):
    """Appends tokens to sequences of one KV pool. All logits are f32 on the CPU, valid until the next call.

    cache: the sequence, by default the one that the runner was made with; it has blocks for what is appended.
    chunk: tokens of a prompt to read at once; most_rows: of one step.
    """

    chunk: int
    most_rows: int

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of how it runs."""

    def load_kernels(self) -> None:
        """Compile what the first token will need, or read it from its cache."""

    def read(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [vocab] after some more tokens of a prompt, dense; length: of all the text, where it goes on after
        them."""

    def score(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """As `read`, the logits [t, vocab] after each of the tokens."""

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [rows, vocab] after one more token of each row, by the runtime's strategy."""

    def next_tokens(self, rows: Sequence[Row], choices: Sequence[Choice]) -> list[int]:
        """What each row's `Choice` takes of its logits after one more token, by the runtime's strategy.

        Raises `RuntimeError` for logits that are not numbers.
        """

    def rest(self) -> None:
        """Nothing will come for a while: use no CPU until it does."""


class CpuRunner:
    """Everything on the CPU."""

    chunk, most_rows = 256, MAX_BATCH
    notices: tuple[str, ...] = ()

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        runtime: FFNRuntime,
        expect_scattered_reads: Callable[[bool], None] = lambda scattered: None,
    ) -> None:
        """`expect_scattered_reads` is told before many rows of a mapped file are read one after another, and after."""
        self._model, self._cache, self._runtime = model, cache, runtime
        self._step = CpuStep(model, cache, runtime)
        self._expect_scattered_reads = expect_scattered_reads
        self._owner = os.getpid()
        # All of a layer's neurons, those that come out 0 left there: the same sum as dense.
        self._reading: Strategy = "exact" if model.spec.fires_sparsely else "dense"
        self._turns_with_length = any(rope.follows_length for rope in model.ropes)

    def load_kernels(self) -> None:
        self._step.load_kernels()
        self._model.load_kernels()

    def read(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        return self._logits(tokens, length, cache or self._cache, len(tokens) - 1)[0]

    def score(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        return self._logits(tokens, length, cache or self._cache, 0)

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        return self._run(rows, self._runtime.strategy)

    def next_tokens(self, rows: Sequence[Row], choices: Sequence[Choice]) -> list[int]:
        return [
            most_likely(logits) if choice.takes_largest else choice.pick(logits)
            for logits, choice in zip(self.decode(rows), choices, strict=True)
        ]

    def rest(self) -> None:
        """Its threads sleep between tokens."""

    @torch_threads(1)  # what is left to torch for one token is too small to share out (8 ms on busy cores for a wait)
    def _run(self, rows: Sequence[Row], strategy: Strategy, first: int = 0) -> torch.Tensor:
        return self._step.rows(rows, strategy, first)

    def _logits(self, tokens: Sequence[int], length: int | None, cache: KVCache, first: int) -> torch.Tensor:
        """Logits after the tokens from `first` on. A few go through the step, for which no weights are widened, but
        where a rotation depends on how long the text is."""
        if len(tokens) == 1 or (len(tokens) <= self._runtime.few and not self._turns_with_length):
            return self._run([Row(cache, token) for token in tokens], self._reading, first)
        self._runtime.as_decode = False
        self._expect_scattered_reads(False)
        # A child of fork waits for ever for torch's threads, which stayed with its parent.
        with torch_threads(1):
            hidden = self._model(torch.tensor(tokens), cache, length)
            self._expect_scattered_reads(self._runtime.strategy != "dense")
            return self._model.logits(hidden[first:])
