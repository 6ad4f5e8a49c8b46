"""Small models and machines that the placement tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from placement import CostModel, VramPlan
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import ModelSpec

SMALL_SPEC = ModelSpec(
    family="llama",
    n_layers=1,
    d_model=4,
    d_ff=3,
    n_heads=1,
    n_kv_heads=1,
    head_dim=4,
    vocab_size=10,
    max_context=64,
    activation="relu",
    dtype="f32",
    fingerprint="small",
)

ROUND_HARDWARE = HardwareProfile(
    name="round numbers",
    source="default",
    cpu_threads=1,
    cpu_read_bandwidth=1e6,
    gpu_read_bandwidth=1e7,
    pcie_bandwidth=1e6,
    handoff_seconds=1e-3,
    gpu_launch_seconds=1e-5,
    cpu_layer_seconds=1e-4,
    vram_bytes=2**30,
)

NO_GPU = replace(
    ROUND_HARDWARE, gpu_read_bandwidth=0, pcie_bandwidth=0, handoff_seconds=0, gpu_launch_seconds=0, vram_bytes=0
)


def small_spec(**changes: Any) -> ModelSpec:
    return replace(SMALL_SPEC, **changes)


def random_model(seed: int) -> CostModel:
    """A cost model small enough to try every choice: up to 3 layers of up to 3 groups, on a random machine."""
    rng = np.random.default_rng(seed)
    group_size, d_ff = int(rng.integers(1, 4)), int(rng.integers(2, 10))
    group_size = max(group_size, -(-d_ff // 3))
    spec = small_spec(
        n_layers=int(rng.integers(1, 4)),
        d_ff=d_ff,
        d_model=int(rng.choice([33, 128, 300])),
        vocab_size=int(rng.integers(10, 2000)),
        gated=bool(rng.integers(2)),
        ffn_bias=bool(rng.integers(2)),
        dtype=str(rng.choice(["f32", "bf16"])),
    )
    hardware = replace(
        ROUND_HARDWARE,
        cpu_read_bandwidth=10 ** rng.uniform(6, 8),
        gpu_read_bandwidth=10 ** rng.uniform(7, 9),
        handoff_seconds=10 ** rng.uniform(-7, -3),
        gpu_launch_seconds=10 ** rng.uniform(-8, -5),
        token_seconds=10 ** rng.uniform(-8, -4),
        cpu_layer_seconds=10 ** rng.uniform(-7, -4),
    )
    predictor_bytes = tuple(int(size) for size in rng.integers(0, 3000, spec.n_layers))
    plan = VramPlan(spec, int(rng.integers(1, 65)), predictor_bytes, prefill_chunk=1, reserve=0, batch=1)
    firing = rng.random((spec.n_layers, d_ff)) ** rng.uniform(0.5, 6)
    strategy = str(rng.choice(["dense", "exact", "learned"]))
    return CostModel(plan, hardware, firing, strategy, rng.uniform(0.8, 2.5), group_size)  # type: ignore[arg-type]
