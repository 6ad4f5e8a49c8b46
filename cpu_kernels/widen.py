"""Rows of stored weights as f32, for the GEMMs of prefill.

Threads: each worker widens a range of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cpu_kernels.blocks import BLOCK, GROUP
from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import F32, FLOATS, I8, I16, I32, I64, LANES, Code, constant, weight_at
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool


def _codes(code: Code, like: Any, row: Any, group: Any, block: int) -> list[Any]:
    """The codes of one block as two f32 [16], without scale."""
    builder = code.builder
    if like.dtype == types.int8:
        at = builder.add(row, builder.mul(group, I64(GROUP)))
        wide = builder.sext(code.load(at, I8, BLOCK, block * BLOCK), ir.VectorType(I32, BLOCK))
    else:
        words = code.load(builder.add(row, builder.mul(group, I64(GROUP // 2))), I16, BLOCK)
        shifted = builder.lshr(words, constant(I16, 4 * block, BLOCK))
        low = builder.zext(builder.and_(shifted, constant(I16, 15, BLOCK)), ir.VectorType(I32, BLOCK))
        wide = builder.sub(low, constant(I32, 8, BLOCK))
    number = builder.sitofp(wide, ir.VectorType(F32, BLOCK))
    return [code.slice(number, at, LANES) for at in (0, LANES)]


@intrinsic
def _widen_groups(typing_context: Any, like: Any, row: Any, codes_bytes: Any, groups: Any, out: Any) -> Any:
    """The row at address `row`, in blocks, as f32 at address `out`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        _, row_at, size, count, out_at = args
        end = builder.add(row_at, size)
        with cgutils.for_range(builder, count, intp=I64) as loop:
            scales = code.scales(end, loop.index)
            base = builder.add(out_at, builder.mul(loop.index, I64(4 * GROUP)))
            for block in range(GROUP // BLOCK):
                for half, codes in enumerate(_codes(code, like, row_at, loop.index, block)):
                    value = builder.fmul(codes, code.lane(scales, block))
                    code.store(value, builder.add(base, I64(4 * (BLOCK * block + LANES * half))))
        return context.get_dummy_value()

    fits = isinstance(like, types.Array) and like.dtype in (types.int8, types.uint8)
    return (types.void(like, types.int64, types.int64, types.int64, types.int64), generate) if fits else None


@intrinsic
def _widen_steps(typing_context: Any, like: Any, row: Any, n: Any, out: Any) -> Any:
    """The leading whole vectors of the row of floats at address `row`, as f32 at address `out`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, size = Code(context, builder), like.dtype.bitwidth // 8
        _, row_at, count, out_at = args
        end = builder.and_(count, I64(-LANES))
        with cgutils.for_range_slice(builder, I64(0), end, I64(LANES), intp=I64) as (start, _):
            value = code.widened(builder.add(row_at, builder.mul(start, I64(size))), like.dtype, LANES)
            code.store(value, builder.add(out_at, builder.mul(start, I64(4))))
        return context.get_dummy_value()

    fits = isinstance(like, types.Array) and like.dtype in FLOATS
    return (types.void(like, types.int64, types.int64, types.int64), generate) if fits else None


def _widen_row(like: np.ndarray, row: int, d: int, out: np.ndarray) -> None:
    raise NotImplementedError("called from compiled code only")


@overload(_widen_row, strict=False)
def _widen_row_of(like: Any, row: Any, d: Any, out: Any) -> Any:
    if like.dtype in FLOATS:
        size = like.dtype.bitwidth // 8

        def floats(like, row, d, out):  # type: ignore[no-untyped-def]
            _widen_steps(like, row, d, out.ctypes.data)
            for j in range(d & -LANES, d):
                out[j] = weight_at(like, row + j * size)

        return floats
    per_byte = 1 if like.dtype == types.int8 else 2

    def blocks(like, row, d, out):  # type: ignore[no-untyped-def]
        groups = (d + GROUP - 1) // GROUP
        _widen_groups(like, row, groups * GROUP // per_byte, groups, out.ctypes.data)

    return blocks


@kernel
def _widen(worker, workers, like, weight, width, d, out):  # type: ignore[no-untyped-def]
    rows = out.shape[0]
    for i in range(rows * worker // workers, rows * (worker + 1) // workers):
        _widen_row(like, weight + i * width, d, out[i])


def widen(matrix: Matrix, rows: slice, pool: WorkerPool) -> np.ndarray:
    """Some rows f32 [k, columns]; for weights in blocks a view on rows padded to whole groups of 128."""
    chosen = matrix.rows[rows]
    width = matrix.columns
    if chosen.itemsize == 1:
        width = -(-width // GROUP) * GROUP
    out = np.empty((len(chosen), width), np.float32)
    pool.run(
        _widen, pool.workers_for(out.nbytes), matrix.like, chosen.ctypes.data, matrix.row_bytes, matrix.columns, out
    )
    return out[:, : matrix.columns]


def widen_ref(matrix: Matrix, rows: slice, pool: WorkerPool | None) -> np.ndarray:
    """`widen` in torch."""
    return matrix.widen(rows).numpy()
