"""Sums of scaled rows, out += sum_k c[k] * row[k], over a slice of their columns, four rows at a time.

A worker takes a slice of columns and goes through all rows in order, so that a sum has one order however many workers
there are, and none has to be merged. Four rows share the loads and stores of the sum.

Sums of int4 rows lie in another order, `finish` puts them right: within a group of 128, the 16 even columns of each of
the four blocks, then the odd ones, as the 32-bit lanes of a group hold them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cpu_kernels.blocks import BLOCK, GROUP, padded
from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import F32, FLOATS, I8, I32, I64, LANES, Code, constant, weight_at


class _Four(NamedTuple):
    """Four rows, what each is multiplied with, and the rows that will be read next; LLVM values."""

    addresses: list[Any]
    ahead: list[Any]
    scales: list[Any]


def _float_sum(code: Code, dtype: Any, rows: _Four, sums: Any, first: Any, last: Any) -> None:
    builder, size = code.builder, dtype.bitwidth // 8
    wide = [code.splat(scale, LANES) for scale in rows.scales]
    with cgutils.for_range_slice(builder, first, last, I64(BLOCK), intp=I64) as (column, _):
        at, offset = builder.add(sums, builder.mul(column, I64(4))), builder.mul(column, I64(size))
        code.fetch_lines(rows.ahead, offset, BLOCK * size)
        for half in range(BLOCK // LANES):
            total = code.load(at, F32, LANES, half * LANES * 4, 4)
            for row, scale in zip(rows.addresses, wide, strict=True):
                weights = code.widened(builder.add(row, offset), dtype, LANES, half * LANES * size)
                total = code.fused(weights, scale, total)
            code.store(total, builder.add(at, I64(half * LANES * 4)))


def _int8_sum(code: Code, rows: _Four, sums: Any, first: Any, last: Any, codes_bytes: Any) -> None:
    builder = code.builder
    with cgutils.for_range_slice(builder, first, last, I64(BLOCK), intp=I64) as (column, _):
        at = builder.add(sums, builder.mul(column, I64(4)))
        code.fetch_lines(rows.ahead, column, BLOCK)
        totals = [code.load(at, F32, LANES, half * LANES * 4, 4) for half in (0, 1)]
        scale_at = builder.add(codes_bytes, builder.lshr(column, I64(4)))
        for row, scale in zip(rows.addresses, rows.scales, strict=True):
            stored = code.widened(builder.add(row, scale_at), types.int16, 1)
            step = code.splat(builder.fmul(builder.extract_element(stored, I32(0)), scale), LANES)
            for half in (0, 1):
                codes = code.load(builder.add(row, column), I8, LANES, half * LANES)
                wide = builder.sitofp(builder.sext(codes, ir.VectorType(I32, LANES)), ir.VectorType(F32, LANES))
                totals[half] = code.fused(wide, step, totals[half])
        for half, total in enumerate(totals):
            code.store(total, builder.add(at, I64(half * LANES * 4)))


def _int4_sum(code: Code, rows: _Four, sums: Any, offsets: Any, first: Any, last: Any, codes_bytes: Any) -> None:
    """Codes stay where they lie in the 32-bit lanes, scaled back; their offset of 8 goes to a sum per block."""
    builder = code.builder
    shrink = [[16.0**-n for n in range(4)], [16.0**-4, 16.0**-5, 16.0**-6, 1.0]]  # the last is shifted down
    factors = [ir.Constant(ir.VectorType(F32, 4), numbers) for numbers in shrink]
    wide = [code.splat(scale, 4) for scale in rows.scales]
    with cgutils.for_range_slice(builder, first, last, I64(GROUP), intp=I64) as (column, _):
        at, offset = builder.add(sums, builder.mul(column, I64(4))), builder.lshr(column, I64(1))
        code.fetch_lines(rows.ahead, offset, GROUP // 2)
        totals = [code.load(at, F32, LANES, part * LANES * 4, 4) for part in range(8)]
        offsets_at = builder.add(offsets, builder.lshr(column, I64(3)))
        taken = code.load(offsets_at, F32, 4, align=4)
        scale_at = builder.add(codes_bytes, builder.lshr(column, I64(4)))
        for row, scale in zip(rows.addresses, wide, strict=True):
            steps = builder.fmul(code.widened(builder.add(row, scale_at), types.int16, 4), scale)
            taken = builder.fadd(taken, steps)
            halves = [builder.fmul(steps, factor) for factor in factors]
            words = code.load(builder.add(row, offset), I32, LANES)
            for part in range(8):
                if part < 7:
                    codes = builder.and_(words, constant(I32, 15 << 4 * part, LANES))
                else:
                    codes = builder.lshr(words, constant(I32, 28, LANES))
                number = builder.sitofp(codes, ir.VectorType(F32, LANES))
                totals[part] = code.fused(number, code.lane(halves[part // 4], part % 4), totals[part])
        code.store(taken, offsets_at)
        for part, total in enumerate(totals):
            code.store(total, builder.add(at, I64(part * LANES * 4)))


_FOUR = types.UniTuple(types.int64, 4)
_SCALES = types.UniTuple(types.float32, 4)
_SUMS = types.Array(types.float32, 1, "C")


@intrinsic
def _add_rows(
    typing_context: Any, like: Any, rows: Any, ahead: Any, scales: Any, sums: Any, offsets: Any, first: Any, last: Any,
    codes_bytes: Any,
) -> Any:  # fmt: skip
    """sums[first:last] += the four rows' columns, each row times its scale; lines of `ahead` are fetched meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        rows = _Four(*([builder.extract_value(args[at], n) for n in range(4)] for at in (1, 2, 3)))
        data, taken = code.data(_SUMS, args[4]), code.data(_SUMS, args[5])
        start, end, size = args[6:9]
        if like.dtype in FLOATS:
            _float_sum(code, like.dtype, rows, data, start, end)
        elif like.dtype == types.int8:
            _int8_sum(code, rows, data, start, end, size)
        else:
            _int4_sum(code, rows, data, taken, start, end, size)
        return context.get_dummy_value()

    signature = types.void(like, _FOUR, _FOUR, _SCALES, _SUMS, _SUMS, types.int64, types.int64, types.int64)
    return signature, generate


def columns_unit(like: np.ndarray) -> int:
    """Slices of columns begin and end at multiples of this, but for the row's end; a kernel's helper."""
    raise NotImplementedError("called from compiled code only")


@overload(columns_unit, inline="always", strict=False)
def _columns_unit(like: Any) -> Any:
    unit = GROUP if like.dtype == types.uint8 else BLOCK
    return lambda like: unit


def _last_columns(like: Any, rows: Any, scales: Any, sums: Any, first: int, last: int) -> None:
    raise NotImplementedError("called from compiled code only")


@overload(_last_columns, inline="always", strict=False)
def _add_last_columns(like: Any, rows: Any, scales: Any, sums: Any, first: Any, last: Any) -> Any:
    """The columns of rows of floats beyond the last whole vector; blocks are padded and have none."""
    if like.dtype not in FLOATS:
        return lambda like, rows, scales, sums, first, last: None
    size = like.dtype.bitwidth // 8

    def add(like, rows, scales, sums, first, last):  # type: ignore[no-untyped-def]
        for j in range(first, last):
            for k in range(4):
                sums[j] += scales[k] * weight_at(like, rows[k] + j * size)

    return add


@kernel
def _four_rows(weight, width, ids, k, count):  # type: ignore[no-untyped-def]
    """Addresses of rows ids[k : k + 4]; beyond the end the last again."""
    last = count - 1
    return (
        weight + ids[min(k, last)] * width,
        weight + ids[min(k + 1, last)] * width,
        weight + ids[min(k + 2, last)] * width,
        weight + ids[min(k + 3, last)] * width,
    )


@kernel
def sum_rows(like, weight, width, ids, scales, count, d, first, last, sums, offsets):  # type: ignore[no-untyped-def]
    """sums[t, first:last] = sum over k < count of scales[t, k] * columns [first, last) of row ids[k].

    weight: address of the matrix, rows of `width` bytes and `d` columns. first and last are multiples of
    `columns_unit`. sums: f32 [t, P]; offsets: f32 [t, P / 32], for int4.
    """
    zero, tokens = np.float32(0), scales.shape[0]
    for t in range(tokens):
        sums[t, first:last] = 0
        offsets[t, first // BLOCK : last // BLOCK] = 0
    padded_width = (d + GROUP - 1) // GROUP * GROUP
    codes_bytes = padded_width // 2 if columns_unit(like) == GROUP else padded_width
    whole, end = last, last
    if like.itemsize > 1:
        end = min(last, d)
        whole = first + ((end - first) & -BLOCK)
    for k in range(0, count, 4):
        rows = _four_rows(weight, width, ids, k, count)
        ahead = _four_rows(weight, width, ids, k + 4, count)
        for t in range(tokens):
            factors = (
                scales[t, k],
                scales[t, k + 1] if k + 1 < count else zero,
                scales[t, k + 2] if k + 2 < count else zero,
                scales[t, k + 3] if k + 3 < count else zero,
            )
            _add_rows(like, rows, ahead, factors, sums[t], offsets[t], first, whole, codes_bytes)
            _last_columns(like, rows, factors, sums[t], whole, end)


def finish(
    like: np.ndarray, sums: np.ndarray, offsets: np.ndarray, d: int, first: int, last: int, out: np.ndarray
) -> None:
    """out[first:last] += what `sum_rows` left in those columns; a kernel's helper."""
    raise NotImplementedError("called from compiled code only")


@overload(finish, strict=False)
def _finish(like: Any, sums: Any, offsets: Any, d: Any, first: Any, last: Any, out: Any) -> Any:
    def in_order(like, sums, offsets, d, first, last, out):  # type: ignore[no-untyped-def]
        for j in range(first, min(last, d)):
            out[j] += sums[j]

    def from_lanes(like, sums, offsets, d, first, last, out):  # type: ignore[no-untyped-def]
        for j in range(first, min(last, d)):
            group, column = j & -GROUP, j & (GROUP - 1)
            block, at = column // BLOCK, column % BLOCK
            place = group + (at % 2) * 64 + block * LANES + at // 2
            out[j] += sums[place] - np.float32(8) * offsets[j // BLOCK]

    return from_lanes if like.dtype == types.uint8 else in_order


def new_sums(rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Buffers for `sum_rows`: f32 [rows, P] and [rows, P / 32]."""
    return np.zeros((rows, padded(d)), np.float32), np.zeros((rows, padded(d) // BLOCK), np.float32)
