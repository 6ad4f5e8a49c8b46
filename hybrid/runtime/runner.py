"""`Runner`: what an engine lets read prompts and decode tokens. One for the CPU alone, one for GPU and CPU together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch

from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Transformer
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.sampling import Sampler, most_likely
from profiler.common.openmp import torch_threads
from profiler.common.spec import Strategy


class Runner(Protocol):
    """Appends tokens to the engine's KV cache. All logits are f32 [vocab] on the CPU, valid until the next call.

    chunk: tokens of a prompt to read at once.
    """

    chunk: int

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of how it runs."""

    def load_kernels(self) -> None:
        """Compile what the first token will need, or read it from its cache."""

    def read(self, tokens: list[int], length: int | None = None) -> torch.Tensor:
        """Logits after some more tokens of a prompt, dense; length: of all the text, where it goes on after them."""

    def decode(self, token: int) -> torch.Tensor:
        """Logits after one more token of an answer, by the runtime's strategy."""

    def greedy(self, token: int) -> int:
        """The id of the largest logit after one more token, the lowest among equals, by the runtime's strategy.

        Raises `RuntimeError` for logits that are not numbers.
        """

    def draw(self, token: int, sampler: Sampler) -> int:
        """What `sampler`, one that `draws_from_few`, draws after one more token, by the runtime's strategy.

        Raises `RuntimeError` as `greedy` does.
        """

    def rest(self) -> None:
        """Nothing will come for a while: use no CPU until it does."""


class CpuRunner:
    """Everything on the CPU."""

    chunk = 256
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

    def load_kernels(self) -> None:
        self._step.load_kernels()
        self._model.load_kernels()

    def read(self, tokens: list[int], length: int | None = None) -> torch.Tensor:
        if len(tokens) == 1:
            return self._run(tokens[0], "dense")
        self._runtime.as_decode = False
        if len(tokens) > self._runtime.few:
            self._expect_scattered_reads(False)
        # A child of fork waits for ever for torch's threads, which stayed with its parent.
        with torch_threads(self._runtime.pool.threads if self._owner == os.getpid() else 1):
            hidden = self._model(torch.tensor(tokens), self._cache, length)
            self._expect_scattered_reads(self._runtime.strategy != "dense")
            return self._model.logits(hidden[-1:])[0]

    def decode(self, token: int) -> torch.Tensor:
        return self._run(token, self._runtime.strategy)

    def greedy(self, token: int) -> int:
        return most_likely(self.decode(token))

    def draw(self, token: int, sampler: Sampler) -> int:
        return sampler.pick(self.decode(token), ())

    def rest(self) -> None:
        """Its threads sleep between tokens."""

    @torch_threads(1)  # what is left to torch for one token is too small to share out (8 ms on busy cores for a wait)
    def _run(self, token: int, strategy: Strategy) -> torch.Tensor:
        return self._step.run(token, strategy)
