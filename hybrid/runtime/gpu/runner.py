"""`GpuRunner`: prompts and tokens with dense parts and hot neurons on the GPU, cold neurons on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch

from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.transformer import Transformer
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.host_rows import HostRows
from hybrid.runtime.gpu.prefill import GpuPrefill
from hybrid.runtime.gpu.step import GpuStep
from hybrid.runtime.sampling import Choice
from placement.placement import Placement
from placement.prefill import ColdPrefill
from placement.prompt import PromptTime
from placement.workspace import ENGINE_ROWS, PREFILL_CHUNK
from profiler.common.hardware import HardwareProfile
from profiler.common.openmp import torch_threads
from profiler.common.spec import NAMING, Strategy

# Up to so many tokens of a prompt go through the decode step as its rows; more through prefill's GEMMs.
FEW_TOKENS = 8


class GpuRunner:
    """A `Runner` on `device`. `arena`: what it takes there, in one allocation; `prefill`: with counters of its ways."""

    chunk = PREFILL_CHUNK

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        runtime: FFNRuntime,
        placement: Placement,
        device: torch.device,
        hardware: HardwareProfile,
        expect_scattered_reads: Callable[[bool], None] = lambda scattered: None,
        rows: int = ENGINE_ROWS,
        host: HostRows | None = None,
    ) -> None:
        """Copies the GPU's part there. `hardware` says how prefill's cold neurons are best computed;
        `expect_scattered_reads` is as for `CpuRunner`. rows: the most of a step, at least `FEW_TOKENS`, which more
        memory there must be for. host: the model's, where other runners have it too, as CUDA takes no row twice."""
        self.most_rows = rows
        self._expect_scattered_reads = expect_scattered_reads
        self._model, self._cache, self._runtime, self._placement = model, cache, runtime, placement
        self._owner = os.getpid() if device.type == "cuda" else None
        # All of a layer's neurons, those that come out 0 left there: the same sum as dense.
        self._reading: Strategy = "exact" if model.spec.fires_sparsely else "dense"
        self._turns_with_length = any(rope.follows_length for rope in model.ropes)
        self._host = host or HostRows(model, placement, device, runtime.strategy in NAMING)
        cost = ColdPrefill(hardware.with_threads(runtime.pool.threads), model.spec, runtime.precision, runtime.few)
        self._prompts = PromptTime(cost, placement.choice, self._host.cold.keys())
        counting = DeviceArena(device)
        self._take(counting)
        self.arena = DeviceArena(device, counting.used)
        self.step, self.prefill = self._take(self.arena)

    def _take(self, arena: DeviceArena) -> tuple[GpuStep, GpuPrefill]:
        step = GpuStep(self._model, self._cache, self._runtime, self._placement, arena, self._host, self.most_rows)
        given = (self._model, step.weights, self._cache, self._runtime, arena)
        return step, GpuPrefill(*given, self._prompts.by_cpu, step.rotations, step.logits, self._host.cold)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of how it runs."""
        return self._host.notices

    @torch_threads(1)
    def load_kernels(self) -> None:
        self.step.load_kernels(self._runtime.strategy)
        self.prefill.load_kernels()

    def read(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        if self._are_rows(len(tokens)):
            return self._few(tokens, cache)[-1]
        with self._reading_prompt():
            return self.prefill.read(tokens, length=length, cache=cache)

    def score(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        if self._are_rows(len(tokens)):
            return self._few(tokens, cache)
        with self._reading_prompt():
            return self.prefill.score(tokens, length, cache)

    @torch_threads(1)
    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        self._check_process()
        return self.step.run(rows, self._runtime.strategy)

    @torch_threads(1)
    def next_tokens(self, rows: Sequence[Row], choices: Sequence[Choice]) -> list[int]:
        self._check_process()
        return self.step.next_tokens(rows, choices, self._runtime.strategy)

    def _are_rows(self, tokens: int) -> bool:
        """Whether some of a prompt go through the step: a few, but where a rotation depends on how long the text is."""
        return tokens == 1 or (tokens <= FEW_TOKENS and not self._turns_with_length)

    @torch_threads(1)
    def _few(self, tokens: Sequence[int], cache: KVCache | None) -> torch.Tensor:
        """Logits [t, vocab] after each of a few tokens of a prompt."""
        self._check_process()
        return self.step.run([Row(cache or self._cache, token) for token in tokens], self._reading)

    @contextmanager
    def _reading_prompt(self) -> Generator[None, None, None]:
        """Many tokens are read, on the pool of the step's workers."""
        self._check_process()
        self.rest()
        self._expect_scattered_reads(False)
        yield
        self._expect_scattered_reads(self._runtime.strategy != "dense")

    def rest(self) -> None:
        self.step.rest()

    def expected_seconds(self, tokens: int) -> float | None:
        """To read a prompt of so many tokens from an empty cache, by the cost model; None for few, which are rows."""
        return None if self._are_rows(tokens) else self._prompts.seconds(tokens)

    def _check_process(self) -> None:
        """Raise in a child of `fork`, where CUDA calls fail one by one with messages that do not say why."""
        if self._owner not in (None, os.getpid()):
            raise RuntimeError(
                "this engine's GPU belongs to the process that loaded it; CUDA does not survive fork, so start the "
                "child by multiprocessing's `spawn` and load an engine there"
            )
