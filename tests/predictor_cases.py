"""Small layers and samples that the predictor tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from predictor.samples import FFNWeights
from profiler.common.spec import ModelSpec

SPEC = ModelSpec(
    family="llama",
    n_layers=2,
    d_model=24,
    d_ff=37,
    n_heads=2,
    n_kv_heads=2,
    head_dim=12,
    vocab_size=50,
    max_context=64,
    activation="relu",
    dtype="f32",
    fingerprint="0123456789abcdef",
)


def small_spec(**changes: Any) -> ModelSpec:
    return replace(SPEC, **changes)


def random_layer(seed: int, spec: ModelSpec = SPEC, rank: int | None = None, dtype: Any = torch.float32) -> FFNWeights:
    """A layer whose firing matrix has `rank`, or full rank, with a bias that keeps most neurons silent."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    rank = rank or min(spec.d_model, spec.d_ff)
    firing = (normal(spec.d_ff, rank) @ normal(rank, spec.d_model) / (rank * spec.d_model) ** 0.5).to(dtype)
    other, down = (normal(spec.d_ff, spec.d_model).to(dtype) for _ in range(2))
    bias = (normal(spec.d_ff) * 0.3 - 1).to(dtype)
    if spec.gated:
        return FFNWeights(firing, other, down, spec.activation, gate_bias=bias)
    return FFNWeights(None, firing, down, spec.activation, up_bias=bias)


def random_samples(
    seed: int, tokens: int, spec: ModelSpec = SPEC, documents: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs f16 [n_layers, tokens, d] of unequal variance per dimension around a mean, and a document per token."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.5, 2.0, spec.d_model)
    inputs = rng.standard_normal((spec.n_layers, tokens, spec.d_model)) * spread + 0.2
    return inputs.astype(np.float16), rng.integers(0, documents, tokens).astype(np.int32)
