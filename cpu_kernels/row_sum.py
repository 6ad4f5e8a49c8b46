"""Sums of scaled rows, sum_k c[k] * row[k], four rows at a time, which share the loads and stores of the sum.

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
from cpu_kernels.compiled import subroutine
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


def _put_steps(code: Code, rows: _Four, taken: Any, tables: Any, first: Any, last: Any, codes_bytes: Any) -> None:
    """Write what each row's codes of each block are multiplied with to `tables`, f32 [row, 2 P / 32].

    int8: row scale times block scale. int4, where `taken` is given: for each group, that over 16^n for the n-th nibble
    of a 32-bit lane, as codes stay where they lie; the last is shifted down. Their offset of 8 goes to `taken`
    [P / 32].
    The sums read these by broadcasting loads, which cost no vector operation.
    """
    builder = code.builder
    shrink = [[16.0**-n for n in range(4)], [16.0**-4, 16.0**-5, 16.0**-6, 1.0]]
    factors = [ir.Constant(ir.VectorType(F32, 4), numbers) for numbers in shrink]
    wide = [code.splat(scale, 4) for scale in rows.scales]
    start = builder.and_(first, I64(-GROUP))  # whole groups, so that no read leaves the row
    with cgutils.for_range_slice(builder, start, last, I64(GROUP), intp=I64) as (column, _):
        scale_at = builder.add(codes_bytes, builder.lshr(column, I64(4)))
        taken_at = None if taken is None else builder.add(taken, builder.lshr(column, I64(3)))
        offset = None if taken is None else code.load(taken_at, F32, 4, align=4)
        for number, (row, scale) in enumerate(zip(rows.addresses, wide, strict=True)):
            steps = builder.fmul(code.widened(builder.add(row, scale_at), types.int16, 4), scale)
            table = builder.add(tables[number], builder.lshr(column, I64(3 if taken is None else 2)))
            if taken is None:
                code.store(steps, table)
            else:
                offset = builder.fadd(offset, steps)
                for half, factor in enumerate(factors):
                    code.store(builder.fmul(steps, factor), builder.add(table, I64(16 * half)))
        if taken is not None:
            code.store(offset, taken_at)


def _fetch_scales(code: Code, ahead: list[Any], first: Any, last: Any, codes_bytes: Any) -> None:
    """Fetch the scales of columns [first, last) of rows: a line for 1024."""
    builder = code.builder
    with cgutils.for_range_slice(builder, first, last, I64(1024), intp=I64) as (column, _):
        code.fetch_lines(ahead, builder.add(codes_bytes, builder.lshr(column, I64(4))), 64)


def _step(code: Code, table: Any, offset: Any, number: int) -> Any:
    loaded = code.load(code.builder.add(table, offset), F32, 1, 4 * number, 4)
    return code.splat(code.builder.extract_element(loaded, I32(0)), LANES)


def _int8_sum(code: Code, rows: _Four, sums: Any, tables: Any, first: Any, last: Any, codes_bytes: Any) -> None:
    builder = code.builder
    _fetch_scales(code, rows.ahead, first, last, codes_bytes)
    _put_steps(code, rows, None, tables, first, last, codes_bytes)
    with cgutils.for_range_slice(builder, first, last, I64(BLOCK), intp=I64) as (column, _):
        at, offset = builder.add(sums, builder.mul(column, I64(4))), builder.lshr(column, I64(3))
        code.fetch_lines(rows.ahead, column, BLOCK)
        for half in (0, 1):
            total = code.load(at, F32, LANES, half * LANES * 4, 4)
            for row, table in zip(rows.addresses, tables, strict=True):
                codes = code.load(builder.add(row, column), I8, LANES, half * LANES)
                wide = builder.sitofp(builder.sext(codes, ir.VectorType(I32, LANES)), ir.VectorType(F32, LANES))
                total = code.fused(wide, _step(code, table, offset, 0), total)
            code.store(total, builder.add(at, I64(half * LANES * 4)))


def _int4_sum(
    code: Code, rows: _Four, sums: Any, tables: Any, taken: Any, first: Any, last: Any, codes_bytes: Any
) -> None:
    builder = code.builder
    _fetch_scales(code, rows.ahead, first, last, codes_bytes)
    _put_steps(code, rows, taken, tables, first, last, codes_bytes)
    with cgutils.for_range_slice(builder, first, last, I64(GROUP), intp=I64) as (column, _):
        at, offset = builder.add(sums, builder.mul(column, I64(4))), builder.lshr(column, I64(1))
        code.fetch_lines(rows.ahead, offset, GROUP // 2)
        words = [code.load(builder.add(row, offset), I32, LANES) for row in rows.addresses]
        step_at = builder.lshr(column, I64(2))
        for part in range(8):
            total = code.load(at, F32, LANES, part * LANES * 4, 4)
            for word, table in zip(words, tables, strict=True):
                if part < 7:
                    codes = builder.and_(word, constant(I32, 15 << 4 * part, LANES))
                else:
                    codes = builder.lshr(word, constant(I32, 28, LANES))
                number = builder.sitofp(codes, ir.VectorType(F32, LANES))
                total = code.fused(number, _step(code, table, step_at, part), total)
            code.store(total, builder.add(at, I64(part * LANES * 4)))


_FOUR = types.UniTuple(types.int64, 4)
_SCALES = types.UniTuple(types.float32, 4)
_SUMS = types.Array(types.float32, 1, "C")


@intrinsic
def _add_rows(
    typing_context: Any, like: Any, rows: Any, ahead: Any, scales: Any, sums: Any, offsets: Any, steps: Any,
    first: Any, last: Any, codes_bytes: Any,
) -> Any:  # fmt: skip
    """sums[first:last] += the four rows' columns, each row times its scale; lines of `ahead` are fetched meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        rows = _Four(*([builder.extract_value(args[at], n) for n in range(4)] for at in (1, 2, 3)))
        data, taken = code.data(_SUMS, args[4]), code.data(_SUMS, args[5])
        start, end, size = args[7:10]
        (size_of_steps,) = cgutils.unpack_tuple(builder, context.make_array(_SUMS)(context, builder, args[6]).shape)
        # A quarter of the elements to each row; 4 bytes each.
        tables = [builder.add(code.data(_SUMS, args[6]), builder.mul(size_of_steps, I64(n))) for n in range(4)]
        if like.dtype in FLOATS:
            _float_sum(code, like.dtype, rows, data, start, end)
        elif like.dtype == types.int8:
            _int8_sum(code, rows, data, tables, start, end, size)
        else:
            _int4_sum(code, rows, data, tables, taken, start, end, size)
        return context.get_dummy_value()

    signature = types.void(like, _FOUR, _FOUR, _SCALES, _SUMS, _SUMS, _SUMS, types.int64, types.int64, types.int64)
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


@subroutine(forceinline=True)
def four_rows(weight, width, ids, k, count):  # type: ignore[no-untyped-def]
    """Addresses of rows ids[k : k + 4]; beyond the end the last again."""
    last = count - 1
    return (
        weight + ids[min(k, last)] * width,
        weight + ids[min(k + 1, last)] * width,
        weight + ids[min(k + 2, last)] * width,
        weight + ids[min(k + 3, last)] * width,
    )


@subroutine
def sum_rows(  # type: ignore[no-untyped-def]
    like, weight, width, ids, scales, start, stop, ahead, d, first, last, sums, offsets, steps
):  # fmt: skip
    """sums[t, first:last] = sum over start <= k < stop of scales[t, k] * columns [first, last) of row ids[k].

    weight: address of the matrix, rows of `width` bytes and `d` columns. first and last are multiples of
    `columns_unit`. ahead: four addresses from which lines are fetched along with those of the last four rows.
    sums: f32 [t, P]; offsets: f32 [t, P / 32], for int4; steps: f32 [4 * 2 P / 32], a worker's own.
    """
    zero, tokens = np.float32(0), scales.shape[0]
    for t in range(tokens):
        sums[t, first:last] = 0
        offsets[t, first // BLOCK : last // BLOCK] = 0
    padded_width = padded(d)
    codes_bytes = padded_width // 2 if columns_unit(like) == GROUP else padded_width
    whole, end = last, last
    if like.itemsize > 1:
        end = min(last, d)
        whole = first + ((end - first) & -BLOCK)
    for k in range(start, stop, 4):
        rows = four_rows(weight, width, ids, k, stop)
        coming = four_rows(weight, width, ids, k + 4, stop) if k + 4 < stop else ahead
        for t in range(tokens):
            factors = (
                scales[t, k],
                scales[t, k + 1] if k + 1 < stop else zero,
                scales[t, k + 2] if k + 2 < stop else zero,
                scales[t, k + 3] if k + 3 < stop else zero,
            )
            _add_rows(like, rows, coming, factors, sums[t], offsets[t], steps, first, whole, codes_bytes)
            _last_columns(like, rows, factors, sums[t], whole, end)


@subroutine
def column_bytes(like, columns):  # type: ignore[no-untyped-def]
    """Bytes of that many columns of a row, without scales."""
    return columns // 2 if columns_unit(like) == GROUP else columns * like.itemsize


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


def new_steps(d: int) -> np.ndarray:
    """A worker's own buffer for `sum_rows`."""
    return np.zeros(8 * (padded(d) // BLOCK), np.float32)


def new_sums(rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Buffers for `rows` results of `sum_rows`: f32 [rows, P] and [rows, P / 32]."""
    return np.zeros((rows, padded(d)), np.float32), np.zeros((rows, padded(d) // BLOCK), np.float32)
