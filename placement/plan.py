"""Byte-exact plan of GPU memory: what each part of a model takes.

The plan is the only place that knows how many bytes a part takes; cost model, solvers and the engine ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placement.workspace import (
    ALIGNMENT,
    BATCHES,
    ENGINE_ROWS,
    KV_BLOCK,
    PREFILL_CHUNK,
    RUNTIME_RESERVE,
    SHARED_KV_BLOCK,
    Workspace,
    aligned,
    cached_tokens,
    copy_bytes,
    layer_bytes,
    neurons_bytes,
    proxy_bytes,
)
from profiler.common.errors import ContextError, InputError
from profiler.common.sizes import UNLIMITED, parse_size
from profiler.common.spec import ModelSpec

__all__ = ["ALIGNMENT", "UNLIMITED", "Choice", "VramPlan", "aligned", "parse_size"]


@dataclass(frozen=True, eq=False)
class Choice:
    """What is on the GPU: `hot` int64 [n_layers] hottest neurons, `layer_on_gpu` bool [n_layers], and the head.

    A layer on the CPU has its attention, KV cache, predictor and every neuron there, so its `hot` is 0.
    """

    hot: np.ndarray
    layer_on_gpu: np.ndarray
    head_on_gpu: bool

    @classmethod
    def all_cpu(cls, n_layers: int) -> Choice:
        return cls(np.zeros(n_layers, dtype=np.int64), np.zeros(n_layers, dtype=bool), False)

    @property
    def uses_gpu(self) -> bool:
        return self.head_on_gpu or bool(self.layer_on_gpu.any())


@dataclass(frozen=True, eq=False)
class VramPlan:
    """Bytes on the GPU for `spec` with sequences of up to `context` tokens; `ContextError` when the model has fewer.

    Each tensor starts at a multiple of `ALIGNMENT`; norms, biases and scales are f32. The input embedding stays in host
    memory, of which a token reads one row. The CUDA context itself is not counted.
    predictor_bytes: per layer, of `workspace.predictor_bytes`; all 0 where no predictor is used. prefill_chunk: the
    most tokens that go through the layers at once. reserve: bytes for loaded kernels, CUDA graphs and cuBLAS, once
    anything runs on the GPU. batch: the most rows of a decode step. kv_tokens: of the pool that sequences share, None
    for one sequence's own cache. certified, proxied: whether there are copies of rows, by which those strategies name
    neurons.
    """

    spec: ModelSpec
    context: int
    predictor_bytes: tuple[int, ...]
    prefill_chunk: int = PREFILL_CHUNK
    reserve: int = RUNTIME_RESERVE
    batch: int = ENGINE_ROWS
    kv_tokens: int | None = None
    certified: bool = False
    proxied: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.context <= self.spec.max_context:
            raise ContextError(
                f"context {self.context} is out of range, this model takes 1 to {self.spec.max_context} tokens; "
                "choose another",
                setting="context",
            )
        if len(self.predictor_bytes) != self.spec.n_layers or min(self.predictor_bytes) < 0:
            raise InputError(f"expected predictor bytes of {self.spec.n_layers} layers, got {self.predictor_bytes}")
        if self.prefill_chunk < 1 or self.reserve < 0:
            raise InputError("prefill_chunk must be at least 1, and reserve at least 0")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise InputError(f"kv_tokens is {self.kv_tokens}, expected at least 1")
        if self.batch not in BATCHES:
            raise InputError(f"batch is {self.batch}, expected one of {', '.join(map(str, BATCHES))}")

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache of one layer, in whole blocks of tokens."""
        tokens = self.context if self.kv_tokens is None else self.kv_tokens
        rows = 2 * self.spec.n_kv_heads * cached_tokens(tokens, self.workspace.block)
        return aligned(rows * self.spec.head_dim * self.spec.kv_element_bytes) + aligned(
            rows * self.spec.kv_scale_bytes
        )

    @cached_property
    def layer_bytes(self) -> np.ndarray:
        """Bytes int64 [n_layers] of each layer on the GPU before its first hot neuron."""
        predictors = aligned(np.array(self.predictor_bytes, dtype=np.int64))
        return layer_bytes(self.spec) + predictors + self.copy_bytes + self.kv_bytes

    @property
    def copy_bytes(self) -> int:
        """Bytes of one layer's certificate or proxy; 0 where neurons are named by neither."""
        if self.proxied:
            return proxy_bytes(self.spec)
        return copy_bytes(self.spec) if self.certified else 0

    @property
    def head_bytes(self) -> int:
        """Bytes of the output projection."""
        return aligned(self.spec.vocab_size * self.spec.embedding_row_bytes)

    def hot_bytes(self, counts: np.ndarray) -> np.ndarray:
        """Bytes of `counts` hot neurons of one layer, elementwise."""
        return neurons_bytes(self.spec, counts.astype(np.int64))

    @property
    def workspace(self) -> Workspace:
        """Scratch that all layers share, buffer by buffer."""
        rank = -(-max(self.predictor_bytes) // (self.spec.d_model + self.spec.d_ff))
        block = KV_BLOCK if self.kv_tokens is None else SHARED_KV_BLOCK
        return Workspace(self.spec, self.context, rank, self.prefill_chunk, self.batch, block)

    def workspace_rows(self) -> list[tuple[str, int]]:
        """What there is on the GPU as soon as anything runs there, as (name, bytes)."""
        return [*self.workspace.rows(), ("reserve: kernels, graphs, cuBLAS", self.reserve)]

    @property
    def workspace_bytes(self) -> int:
        return sum(size for _, size in self.workspace_rows())

    def rows(self, choice: Choice) -> list[tuple[str, int]]:
        """What `choice` puts on the GPU as (name, bytes); the bytes add up to `total_bytes`."""
        on_gpu = choice.layer_on_gpu
        n_layers = int(on_gpu.sum())
        predictors = aligned(np.array(self.predictor_bytes, dtype=np.int64))[on_gpu].sum()
        workspace = self.workspace_rows()
        if not choice.uses_gpu:
            workspace = [(name, 0) for name, _ in workspace]
        return [
            ("dense weights", n_layers * layer_bytes(self.spec)),
            ("predictors", int(predictors)),
            *([("certificates", n_layers * self.copy_bytes)] if self.certified else []),
            *([("proxies", n_layers * self.copy_bytes)] if self.proxied else []),
            ("KV cache", n_layers * self.kv_bytes),
            ("hot neurons", int(self.hot_bytes(choice.hot).sum())),
            ("head", self.head_bytes if choice.head_on_gpu else 0),
            *workspace,
        ]

    def total_bytes(self, choice: Choice) -> int:
        """Bytes on the GPU for `choice`; 0 when nothing is there."""
        return sum(size for _, size in self.rows(choice))
