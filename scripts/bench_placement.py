"""Time the placement solvers on the largest model asked of them, and print one row per budget and solver.

    python scripts/bench_placement.py [--layers 96] [--neurons 49152] [--seed 0] [--time-limit 8]

Activation frequencies are synthetic: a power law whose steepness varies from layer to layer ("varied"), or one law for
every layer ("equal"), which is the harder case, since equal layers can be exchanged for one another.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from placement import CostModel, Solution, VramPlan, solve_greedy, solve_milp
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import ModelSpec


def power_law_firing(n_layers: int, d_ff: int, equal: bool, seed: int) -> np.ndarray:
    """Activation frequencies float64 [n_layers, d_ff]: min(1, scale * rank^-steepness), shuffled within a layer."""
    rng = np.random.default_rng(seed)
    steepness = np.full(n_layers, 0.7) if equal else rng.uniform(0.4, 1.1, n_layers)
    mean = np.full(n_layers, 0.08) if equal else rng.uniform(0.02, 0.25, n_layers)
    frequency = np.arange(1, d_ff + 1, dtype=np.float64)[None, :] ** -steepness[:, None]
    frequency *= (mean / frequency.mean(axis=1))[:, None]
    return rng.permuted(np.minimum(frequency, 1.0), axis=1)


def large_spec(n_layers: int, d_ff: int) -> ModelSpec:
    """An OPT-like model: no gate, d_model a quarter of d_ff, f16."""
    d_model = d_ff // 4
    return ModelSpec(
        family="opt",
        n_layers=n_layers,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=d_model // 128,
        n_kv_heads=d_model // 128,
        head_dim=128,
        vocab_size=50272,
        max_context=2048,
        activation="relu",
        dtype="f16",
        fingerprint="benchmark",
        gated=False,
        norm="layer",
        rope=None,
        ffn_bias=True,
    )


def print_row(case: str, share: float, solution: Solution, build_seconds: float) -> None:
    print(
        f"{case:7} {share:6.0%} {solution.solver:7} {solution.status:10} {solution.seconds * 1e3:10.3f} "
        f"{solution.gap:9.5%} {solution.columns:8} {solution.columns_left:8} {build_seconds:8.2f} "
        f"{solution.solver_seconds:8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--neurons", type=int, default=49152)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=8.0)
    args = parser.parse_args()
    spec, hardware = large_spec(args.layers, args.neurons), HardwareProfile.load()
    print("case    budget solver  status     step (ms)        gap  columns     left build(s) solve(s)")
    for case in ("varied", "equal"):
        firing = power_law_firing(spec.n_layers, spec.d_ff, case == "equal", args.seed)
        start = time.perf_counter()
        model = CostModel(VramPlan(spec, 2048, (0,) * spec.n_layers), hardware, firing, "exact")
        model.columns()
        build_seconds = time.perf_counter() - start
        for share in (0.2, 0.6, 0.97):
            budget = int(share * spec.model_bytes)
            print_row(case, share, solve_greedy(model, budget), build_seconds)
            print_row(case, share, solve_milp(model, budget, args.time_limit), build_seconds)


if __name__ == "__main__":
    main()
