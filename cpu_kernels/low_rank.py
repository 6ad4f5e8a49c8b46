"""Low-rank MLP predictor: which neurons are expected to fire for one token. Weights are int8 with a scale per row.

    hidden[k] = relu(s1[k] * (fc1[k] . x) + b1[k])
    fires(i)  where  s2[i] * (fc2[i] . hidden) + b2[i] >= threshold

Threads: each worker takes a range of rows of each of the two products; ranges do not overlap. The ids are gathered by
the caller from one flag per neuron, so they come out ascending for any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from cpu_kernels.lanes import FAST_SUMS, dot, kernel_view, widen_ref
from cpu_kernels.worker_pool import WorkerPool


@dataclass(frozen=True)
class PredictorView:
    """One layer's predictor as the kernel sees it, with its scratch: hidden f32 [r] and flags bool [f].

    fc1: [r, d] and fc2: [f, r] int8; s1, b1: [r] and s2, b2: [f] f32.
    """

    fc1: np.ndarray
    s1: np.ndarray
    b1: np.ndarray
    fc2: np.ndarray
    s2: np.ndarray
    b2: np.ndarray
    threshold: np.float32
    hidden: np.ndarray
    flags: np.ndarray

    @classmethod
    def of(
        cls,
        fc1: torch.Tensor,
        s1: torch.Tensor,
        b1: torch.Tensor,
        fc2: torch.Tensor,
        s2: torch.Tensor,
        b2: torch.Tensor,
        threshold: float,
    ) -> PredictorView:
        """View contiguous CPU tensors, without a copy. Raises `ValueError` when shapes do not fit."""
        r, f = len(b1), len(b2)
        if fc1.shape[0] != r or s1.shape != (r,) or fc2.shape != (f, r) or s2.shape != (f,):
            raise ValueError(f"predictor shapes do not fit: fc1 {tuple(fc1.shape)}, fc2 {tuple(fc2.shape)}, {r}, {f}")
        return cls(
            *(kernel_view(fc1), kernel_view(s1), kernel_view(b1)),
            *(kernel_view(fc2), kernel_view(s2), kernel_view(b2)),
            threshold=np.float32(threshold),
            hidden=np.empty(r, np.float32),
            flags=np.empty(f, np.bool_),
        )


@njit(fastmath=FAST_SUMS, nogil=True, cache=True)
def _hidden(worker, workers, x, fc1, s1, b1, hidden):  # type: ignore[no-untyped-def]
    r = fc1.shape[0]
    for k in range(r * worker // workers, r * (worker + 1) // workers):
        hidden[k] = max(dot(fc1[k], x, fc1[min(k + 1, r - 1)]) * s1[k] + b1[k], np.float32(0))


@njit(fastmath=FAST_SUMS, nogil=True, cache=True)
def _flags(worker, workers, hidden, fc2, s2, b2, threshold, flags):  # type: ignore[no-untyped-def]
    f = fc2.shape[0]
    for i in range(f * worker // workers, f * (worker + 1) // workers):
        flags[i] = dot(fc2[i], hidden, fc2[min(i + 1, f - 1)]) * s2[i] + b2[i] >= threshold


@njit(nogil=True, cache=True)
def _gather(flags, rows):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(flags.shape[0]):
        if flags[i]:
            rows[count] = i
            count += 1
    return count


def predict_rows(view: PredictorView, x: np.ndarray, rows: np.ndarray, pool: WorkerPool) -> int:
    """Write the ids of the neurons predicted to fire into `rows` int32 [f], ascending; return how many there are.

    x: [d] f32, the FFN's input. Raises `ValueError` when shapes or types do not fit.
    """
    if x.shape != view.fc1.shape[1:] or x.dtype != np.float32:
        raise ValueError(f"predict_rows wants f32 x of {view.fc1.shape[1]}, got {x.dtype} {x.shape}")
    if rows.shape != view.b2.shape or rows.dtype != np.int32:
        raise ValueError(f"predict_rows wants int32 rows of {len(view.b2)}, got {rows.dtype} {rows.shape}")
    first, second = pool.workers_for(view.fc1.nbytes), pool.workers_for(view.fc2.nbytes)
    pool.run(_hidden, first, x, view.fc1, view.s1, view.b1, view.hidden)
    pool.run(_flags, second, view.hidden, view.fc2, view.s2, view.b2, view.threshold, view.flags)
    return _gather(view.flags, rows)


def predict_rows_ref(view: PredictorView, x: np.ndarray, rows: np.ndarray, pool: WorkerPool | None) -> int:
    """`predict_rows` in NumPy."""
    hidden = np.maximum(widen_ref(view.fc1) @ x * view.s1 + view.b1, 0)
    found = np.flatnonzero(widen_ref(view.fc2) @ hidden * view.s2 + view.b2 >= view.threshold)
    rows[: len(found)] = found
    return len(found)
