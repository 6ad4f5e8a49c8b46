"""`LoadedModel`: a plan carried out. Weights, tokenizer and threads, of no sequence yet; a `Runner` adds a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cpu_kernels.contract import LAYOUTS
from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import InputError
from hybrid.formats.packed import PackedModel
from hybrid.formats.text import TextCodec
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Transformer
from hybrid.runtime.devices import hardware_of
from hybrid.runtime.plan import RunPlan
from hybrid.runtime.runner import CpuRunner, Runner
from placement.workspace import ENGINE_ROWS
from profiler.common.spec import NAMING

if TYPE_CHECKING:
    from hybrid.runtime.gpu.host_rows import HostRows

# Pieces of a prompt this short go through the kernels of decode: bringing all weights into panels takes longer.
# Codes of blocks are multiplied token by token there, two tokens' products of floats cost little more than one's.
_FEW_TOKENS, _FEW_OF_BLOCKS = 32, 12


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What engines share.

    settings: the model's own; end_tokens: those that end an answer; notices: what its files say that cannot be used.
    """

    plan: RunPlan
    model: Transformer
    codec: TextCodec
    runtime: FFNRuntime
    settings: SamplingSettings
    end_tokens: frozenset[int]
    notices: tuple[str, ...] = ()

    def runner(self, cache: KVCache, rows: int = ENGINE_ROWS) -> Runner:
        """What reads and writes sequences of the pool of `cache`, by default that one; rows: the most of a GPU's step.

        Raises `InputError` where a GPU's packages are missing.
        """
        plan, weights = self.plan, self.plan.folder.weights
        advise = weights.advise if isinstance(weights, PackedModel) else lambda scattered: None
        if plan.gpu is None:
            return CpuRunner(self.model, cache, self.runtime, advise)
        try:  # needs triton, which comes with torch's builds for GPUs
            from hybrid.runtime.gpu.runner import GpuRunner
        except ModuleNotFoundError as error:
            raise InputError(
                f"a GPU needs the package {error.name}: pip install {error.name}; or give a VRAM budget of 0"
            ) from error
        advise(False)  # cold rows of a file are read one after another, as they are registered
        host = self._host_rows
        advise(self.runtime.strategy != "dense")
        hardware = hardware_of(plan.bundle)
        return GpuRunner(self.model, cache, self.runtime, plan.placement, plan.gpu, hardware, advise, rows, host)

    @cached_property
    def _host_rows(self) -> HostRows:
        """What runners share, as CUDA takes no row twice."""
        from hybrid.runtime.gpu.host_rows import HostRows

        assert self.plan.gpu is not None
        return HostRows(self.model, self.plan.placement, self.plan.gpu, self.runtime.strategy in NAMING)


def load_model(plan: RunPlan) -> LoadedModel:
    """Read the weights of `plan` as its placement lays them out. Raises as `ModelFolder.build` does."""
    spec, codec = plan.spec, plan.folder.codec
    defaults = plan.folder.defaults
    ends = frozenset((*defaults.end_tokens, *codec.eos_tokens()))
    few = _FEW_OF_BLOCKS if LAYOUTS[spec.dtype].in_blocks else _FEW_TOKENS
    pool = WorkerPool(plan.threads)
    runtime = FFNRuntime(plan.strategy, pool, spec.d_model, spec.d_ff, few=few, precision=plan.prefill)
    model = plan.folder.build(runtime, plan.placement, plan.bank, plan.bundle)
    return LoadedModel(plan, model, codec, runtime, defaults.settings, ends, defaults.notes)
