"""Low-rank MLP predictor: which neurons are expected to fire for one token.

    fires(i)  where  fc2[i] . relu(fc1 x + b1) + b2[i] >= threshold
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cpu_kernels.gemv import dot
from cpu_kernels.lanes import FAST_SUMS, widen_ref


@njit(fastmath=FAST_SUMS, nogil=True, cache=True)
def _predict_rows(x, fc1, b1, fc2, b2, threshold, hidden, rows):  # type: ignore[no-untyped-def]
    for k in range(fc1.shape[0]):
        hidden[k] = max(dot(fc1[k], x) + b1[k], np.float32(0))
    count = 0
    for i in range(fc2.shape[0]):
        if dot(fc2[i], hidden) + b2[i] >= threshold:
            rows[count] = i
            count += 1
    return count


def predict_rows(
    x: np.ndarray,
    fc1: np.ndarray,
    b1: np.ndarray,
    fc2: np.ndarray,
    b2: np.ndarray,
    threshold: float,
    hidden: np.ndarray,
    rows: np.ndarray,
) -> int:
    """Write the ids of the neurons predicted to fire into `rows`, ascending, and return how many there are.

    x: [d] f32; fc1: [r, d] and fc2: [f, r] as `kernel_view` gives them; b1: [r], b2: [f] f32; hidden: [r] f32 scratch;
    rows: [f] int32. Raises `ValueError` when shapes do not fit.
    """
    (r, d), f = fc1.shape, fc2.shape[0]
    if x.shape != (d,) or b1.shape != (r,) or fc2.shape != (f, r) or b2.shape != (f,) or hidden.shape != (r,):
        raise ValueError(f"predict_rows shapes do not fit: x {x.shape}, fc1 {fc1.shape}, fc2 {fc2.shape}, b2 {b2.shape}")
    if rows.shape != (f,) or rows.dtype != np.int32:
        raise ValueError(f"predict_rows wants int32 rows of length {f}, got {rows.dtype} {rows.shape}")
    return _predict_rows(x, fc1, b1, fc2, b2, np.float32(threshold), hidden, rows)


def predict_rows_ref(
    x: np.ndarray, fc1: np.ndarray, b1: np.ndarray, fc2: np.ndarray, b2: np.ndarray, threshold: float
) -> np.ndarray:
    """`predict_rows` in NumPy: the ids, ascending."""
    hidden = np.maximum(widen_ref(fc1) @ x + b1, 0)
    return np.nonzero(widen_ref(fc2) @ hidden + b2 >= threshold)[0].astype(np.int32)
