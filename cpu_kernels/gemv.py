"""GEMV and small-batch GEMM: y[t] = W x[t] + b, for one or a few tokens, with f32 sums.

Each row is summed by one worker, so the answer does not depend on how many there are. A worker reads its range of rows
as four streams, a quarter of the range apart, four rows at a time: int4 rows of 2048 weights come at 32 GB/s so, four
neighbouring ones at 24, on two cores.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import MAX_BATCH
from cpu_kernels.inputs import copy, new_inputs, one_input
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import dot_four, prepare, put_products_of_tokens
from cpu_kernels.worker_pool import Each, WorkerPool

# How far ahead in each stream lines are fetched: 1 KB gave 24 GB/s for int4, 2 KB 31, 4 KB 33, 8 KB 30.
AHEAD = 4096


@subroutine
def gemv_rows(like, weight, width, first, last, inputs, d, bias, out):  # type: ignore[no-untyped-def]
    """out[t, first:last] = those rows of the matrix at address `weight`, `width` bytes each, times token t's input."""
    quarter = (last - first + 3) // 4
    for i in range(first, first + quarter):
        at = i, min(i + quarter, last - 1), min(i + 2 * quarter, last - 1), min(i + 3 * quarter, last - 1)
        i0, i1, i2, i3 = at
        rows = weight + i0 * width, weight + i1 * width, weight + i2 * width, weight + i3 * width
        r0, r1, r2, r3 = rows
        ahead = r0 + AHEAD, r1 + AHEAD, r2 + AHEAD, r3 + AHEAD
        for t in range(put_products_of_tokens(like, rows, ahead, inputs, d, at, out), out.shape[0]):
            sums = dot_four(like, rows, ahead, one_input(inputs, t), d)
            for k in range(4):
                out[t, at[k]] = sums[k]
    if bias.shape[0]:
        for t in range(out.shape[0]):
            for j in range(first, last):
                out[t, j] += bias[j]


@subroutine
def chunk_rows(rows, workers):  # type: ignore[no-untyped-def]
    """Rows of one piece of work: some eight pieces a worker, as workers' speeds differ, by 40% on a shared host."""
    return max(16, (rows // (8 * workers) + 3) // 4 * 4)


@subroutine
def gemv_shared(state, workers, like, weight, width, rows, inputs, d, bias, out):  # type: ignore[no-untyped-def]
    """`gemv_rows` over all rows, of which each worker takes pieces until none is left."""
    chunk = chunk_rows(rows, workers)
    first = barrier.take(state) * chunk
    while first < rows:
        gemv_rows(like, weight, width, first, min(first + chunk, rows), inputs, d, bias, out)
        first = barrier.take(state) * chunk


@kernel
def _gemv(worker, workers, state, like, weight, width, x, own, bias, out):  # type: ignore[no-untyped-def]
    d = x.shape[1]
    for t in range(x.shape[0]):
        copy(x[t], d, own[0][t])
        prepare(like, one_input(own, t), d)
    gemv_shared(state, workers, like, weight, width, out.shape[1], own, d, bias, out)


def gemv(matrix: Matrix, x: np.ndarray, bias: np.ndarray, out: np.ndarray, pool: WorkerPool) -> None:
    """out[t, i] = sum_j weight[i, j] * x[t, j] + bias[i], for 1 to 8 tokens, whose rows of weights are read once.

    matrix: [n, d]; x: [t, d] f32; bias: [n] f32, or of length 0 for none; out: [t, n] f32.
    Raises `ValueError` when shapes or types do not fit.
    """
    n, d = matrix.shape
    tokens = x.shape[0]
    if x.shape != (tokens, d) or out.shape != (tokens, n) or bias.shape not in ((n,), (0,)):
        raise ValueError(f"gemv shapes do not fit: weight {matrix.shape}, x {x.shape}, bias {bias.shape}, {out.shape}")
    if not 1 <= tokens <= MAX_BATCH:
        raise ValueError(f"gemv takes 1 to {MAX_BATCH} tokens, got {tokens}; use a GEMM for more")
    if {x.dtype, out.dtype, bias.dtype} != {np.dtype(np.float32)}:
        raise ValueError(f"gemv wants f32 x, bias and out, got {x.dtype}, {bias.dtype}, {out.dtype}")
    workers = pool.workers_for(matrix.nbytes)
    inputs = Each(new_inputs(tokens, d) for _ in range(workers))
    pool.run(_gemv, workers, pool.barrier, matrix.like, matrix.rows.ctypes.data, matrix.row_bytes, x, inputs, bias, out)


def gemv_ref(matrix: Matrix, x: np.ndarray, bias: np.ndarray, out: np.ndarray, pool: WorkerPool | None) -> None:
    """`gemv` in NumPy, accumulated in f64."""
    out[:] = x.astype(np.float64) @ matrix.widen().numpy().astype(np.float64).T
    if bias.size:
        out += bias
