"""Rows of stored weights as f32, for the GEMMs of prefill.

Threads: each worker widens a range of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import LANES, Code, weight_at
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_types import type_like
from cpu_kernels.worker_pool import WorkerPool


@intrinsic
def _widen_vectors(typing_context: Any, like: Any, row: Any, n: Any, out: Any) -> Any:
    """The row of `n` weights at address `row`, but for a tail, as f32 at address `out`."""
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind.widen(Code(context, builder), *args[1:])
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64), generate


def _widen_row(like: np.ndarray, row: int, d: int, out: np.ndarray) -> None:
    raise NotImplementedError("called from compiled code only")


@overload(_widen_row, strict=False)
def _widen_row_of(like: Any, row: Any, d: Any, out: Any) -> Any:
    def whole(like, row, d, out):  # type: ignore[no-untyped-def]
        _widen_vectors(like, row, d, out.ctypes.data)

    size = type_like(like).array.itemsize

    def with_tail(like, row, d, out):  # type: ignore[no-untyped-def]
        _widen_vectors(like, row, d, out.ctypes.data)
        for j in range(d & -LANES, d):
            out[j] = weight_at(like, row + j * size)

    return with_tail if type_like(like).has_tail else whole


@kernel
def _widen(worker, workers, like, weight, width, d, out):  # type: ignore[no-untyped-def]
    rows = out.shape[0]
    for i in range(rows * worker // workers, rows * (worker + 1) // workers):
        _widen_row(like, weight + i * width, d, out[i])


def widen(matrix: Matrix, rows: slice, pool: WorkerPool) -> np.ndarray:
    """Some rows f32 [k, columns]; for weights in blocks a view on rows padded to whole groups of 128."""
    chosen, group = matrix.rows[rows], matrix.kind.group
    out = np.empty((len(chosen), -(-matrix.columns // group) * group), np.float32)
    pool.run(
        _widen, pool.workers_for(out.nbytes), matrix.like, chosen.ctypes.data, matrix.row_bytes, matrix.columns, out
    )
    return out[:, : matrix.columns]


def widen_ref(matrix: Matrix, rows: slice, pool: WorkerPool | None) -> np.ndarray:
    """`widen` in torch."""
    return matrix.widen(rows).numpy()
