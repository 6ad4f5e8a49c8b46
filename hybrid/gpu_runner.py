"""`GpuRunner`: prompts and tokens with dense parts and hot neurons on the GPU, cold neurons on the CPU."""

from __future__ import annotations

import torch

from hybrid.ffn import FFNRuntime, Strategy
from hybrid.gpu_step import GpuStep
from hybrid.kv_cache import KVCache
from hybrid.model import Transformer
from placement.placement import Placement


class GpuRunner:
    """A `Runner` on `device`. A short prompt goes through the decode step, up to 8 tokens at a time."""

    def __init__(
        self, model: Transformer, cache: KVCache, runtime: FFNRuntime, placement: Placement, device: torch.device
    ) -> None:
        self._runtime = runtime
        self.step = GpuStep(model, cache, runtime, placement, device)
        # All of a layer's neurons, those that come out 0 left there: the same sum as dense.
        sparse = model.spec.fires_sparsely
        self._reading: Strategy = "exact" if sparse else "dense"

    def load_kernels(self) -> None:
        torch.set_num_threads(1)
        self.step.load_kernels(self._runtime.strategy)

    def read(self, tokens: list[int]) -> torch.Tensor:
        logits = self.step.few(tokens, self._reading)
        self.rest()
        return logits

    def decode(self, token: int) -> torch.Tensor:
        return self.step.run(token, self._runtime.strategy)

    def rest(self) -> None:
        self.step.rest()
