"""GEMV: y = W x + b, for one token, over bf16, f16 or f32 weights with f32 accumulation."""

from __future__ import annotations

import numpy as np
from numba import njit

from cpu_kernels.lanes import FAST_SUMS, dot, widen_ref
from cpu_kernels.worker_pool import WorkerPool


@njit(fastmath=FAST_SUMS, nogil=True, cache=True)
def _gemv(worker, workers, weight, x, bias, out):  # type: ignore[no-untyped-def]
    rows = weight.shape[0]
    last = rows * (worker + 1) // workers - 1
    for i in range(rows * worker // workers, last + 1):
        out[i] = dot(weight[i], x, weight[min(i + 1, last)])
        if bias.shape[0]:
            out[i] += bias[i]


def gemv(weight: np.ndarray, x: np.ndarray, bias: np.ndarray, out: np.ndarray, pool: WorkerPool) -> None:
    """out[i] = sum_j weight[i, j] * x[j] + bias[i].

    weight: [n, d] as `kernel_view` gives it; x: [d] f32; bias: [n] f32, or of length 0 for none; out: [n] f32.
    Each row is summed by one worker, so the answer does not depend on how many there are.
    Raises `ValueError` when shapes or types do not fit.
    """
    n, d = weight.shape
    if x.shape != (d,) or out.shape != (n,) or bias.shape not in ((n,), (0,)):
        raise ValueError(f"gemv shapes do not fit: weight {weight.shape}, x {x.shape}, bias {bias.shape}, {out.shape}")
    if {x.dtype, out.dtype, bias.dtype} != {np.dtype(np.float32)}:
        raise ValueError(f"gemv wants f32 x, bias and out, got {x.dtype}, {bias.dtype}, {out.dtype}")
    pool.run(_gemv, pool.workers_for(weight.nbytes), weight, x, bias, out)


def gemv_ref(weight: np.ndarray, x: np.ndarray, bias: np.ndarray, out: np.ndarray, pool: WorkerPool | None) -> None:
    """`gemv` in NumPy, accumulated in f64."""
    out[:] = widen_ref(weight).astype(np.float64) @ x.astype(np.float64)
    if bias.size:
        out += bias
