"""Dot products of rows with one input, four rows at a time.

Four rows share the loads of the input and the sums over lanes at the end, which are a quarter of the work for int4 rows
of 2048 weights. A row's sum has the same order in any company; what is left over at the end of a range is computed as
four times the same row, which costs nothing to read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cpu_kernels.blocks import BLOCK, GROUP
from cpu_kernels.lanes import F32, FLOATS, I8, I16, I32, I64, LANES, Code, Input, weight_at

STEP = 32  # elements of one step over floats: two sums of 16 lanes for each of the four rows
Rows = tuple[int, int, int, int]  # addresses


def _each_step(code: Code, count: Any) -> Any:
    return cgutils.for_range(code.builder, count, intp=I64)


def _fetch_scales(code: Code, ahead: list[Any], codes_bytes: Any, groups: Any) -> None:
    """Fetch what lies after the codes of rows: 8 bytes of scales a group."""
    with cgutils.for_range_slice(code.builder, I64(0), groups, I64(8), intp=I64) as (group, _):
        code.fetch_lines(ahead, code.builder.add(codes_bytes, code.builder.mul(group, I64(8))), 64)


def _float_dots(code: Code, dtype: Any, rows: list[Any], ahead: list[Any], x: Any, n: Any) -> list[Any]:
    """rows . x over the leading whole steps of `STEP` elements."""
    builder, size = code.builder, dtype.bitwidth // 8
    sums = [code.sums(STEP // LANES) for _ in rows]
    with _each_step(code, builder.lshr(n, I64(5))) as loop:
        offset = builder.mul(loop.index, I64(STEP * size))
        code.fetch_lines(ahead, offset, STEP * size)
        x_at = builder.add(x, builder.mul(loop.index, I64(STEP * 4)))
        for part in range(STEP // LANES):
            inputs = code.load(x_at, F32, LANES, part * LANES * 4, 4)
            for row, totals in zip(rows, sums, strict=True):
                weights = code.widened(builder.add(row, offset), dtype, LANES, part * LANES * size)
                builder.store(code.fused(weights, inputs, builder.load(totals[part])), totals[part])
    return code.add_up_four([builder.fadd(builder.load(a), builder.load(b)) for a, b in sums])


def _put_scales(code: Code, ends: list[Any], x_scales: Any, x_sums: Any, scratch: Any, groups: Any) -> list[Any]:
    """Write each row's block scales times the input's to `scratch`, f32 [4, 4 groups]; where `x_sums` is given, return
    each row's sum of scales times those. The products read their scales from there by broadcasting loads, which cost no
    vector operation: int4 rows in the cache went from 21 to 25 GB/s."""
    builder = code.builder
    totals = [code.sums(1, 4)[0] for _ in ends]
    row_bytes = builder.mul(groups, I64(16))
    with _each_step(code, groups) as loop:
        step = builder.mul(loop.index, I64(16))
        inputs = code.load(x_scales, F32, 4, step, 4)
        for number, (end, total) in enumerate(zip(ends, totals, strict=True)):
            stored = code.scales(end, loop.index)
            at = builder.add(builder.add(scratch, builder.mul(row_bytes, I64(number))), step)
            code.store(builder.fmul(inputs, stored), at)
            if x_sums is not None:
                offset = code.fused(code.load(x_sums, F32, 4, step, 4), stored, builder.load(total))
                builder.store(offset, total)
    return [builder.load(total) for total in totals]


def _scale_tables(code: Code, scratch: Any, groups: Any) -> list[Any]:
    """Where `_put_scales` wrote each row's scales."""
    row_bytes = code.builder.mul(groups, I64(16))
    return [code.builder.add(scratch, code.builder.mul(row_bytes, I64(number))) for number in range(4)]


def _int8_dots(code: Code, rows: list[Any], ahead: list[Any], v: list[Any], groups: Any, scaled: bool) -> list[Any]:
    """Codes . x; each block's sum times its input scale and, where `scaled`, the scale that lies after the codes."""
    builder = code.builder
    sums = [code.sums(1)[0] for _ in rows]
    codes_bytes = builder.mul(groups, I64(GROUP))
    tables = [v[2]] * 4
    if scaled:
        _fetch_scales(code, ahead, codes_bytes, groups)
        _put_scales(code, [builder.add(row, codes_bytes) for row in rows], v[2], None, v[5], groups)
        tables = _scale_tables(code, v[5], groups)
    with _each_step(code, groups) as loop:
        offset = builder.mul(loop.index, I64(GROUP))
        code.fetch_lines(ahead, offset, GROUP)
        x_at = builder.add(v[1], builder.mul(loop.index, I64(2 * GROUP)))
        for block in range(GROUP // BLOCK):
            inputs = code.load(x_at, I16, BLOCK, block * 2 * BLOCK, 2)
            for row, table, total in zip(rows, tables, sums, strict=True):
                stored = code.load(builder.add(row, offset), I8, BLOCK, block * BLOCK)
                codes = builder.sext(stored, ir.VectorType(I16, BLOCK))
                _add_block(code, codes, inputs, table, loop.index, block, total)
    return code.add_up_four([builder.load(total) for total in sums])


def _int4_dots(code: Code, rows: list[Any], ahead: list[Any], v: list[Any], groups: Any) -> list[Any]:
    """The same over nibbles, which carry an offset of 8: its part of each sum is taken off at the end."""
    builder = code.builder
    sums = [code.sums(1)[0] for _ in rows]
    codes_bytes = builder.mul(groups, I64(GROUP // 2))
    _fetch_scales(code, ahead, codes_bytes, groups)
    offsets = _put_scales(code, [builder.add(row, codes_bytes) for row in rows], v[3], v[4], v[5], groups)
    tables = _scale_tables(code, v[5], groups)
    with _each_step(code, groups) as loop:
        offset = builder.mul(loop.index, I64(GROUP // 2))
        code.fetch_lines(ahead, offset, GROUP // 2)
        words = [code.load(builder.add(row, offset), I16, BLOCK) for row in rows]
        x_at = builder.add(v[1], builder.mul(loop.index, I64(2 * GROUP)))
        for block in range(GROUP // BLOCK):
            inputs = code.load(x_at, I16, BLOCK, block * 2 * BLOCK, 2)
            for word, table, total in zip(words, tables, sums, strict=True):
                _add_block(code, code.nibbles(word, block), inputs, table, loop.index, block, total)
    whole = code.add_up_four([builder.load(total) for total in sums])
    taken = code.add_up_four([code.widened_to(offset, LANES) for offset in offsets])
    return [builder.fsub(a, b) for a, b in zip(whole, taken, strict=True)]


def _add_block(code: Code, codes: Any, inputs: Any, table: Any, group: Any, block: int, total: Any) -> None:
    """total += codes . inputs, lane by lane, times the block's scale in `table`."""
    builder = code.builder
    at = builder.add(builder.add(table, builder.mul(group, I64(16))), I64(4 * block))
    scale = code.splat(builder.extract_element(code.load(at, F32, 1, 0, 4), I32(0)), LANES)
    products = builder.sitofp(code.pair_products(codes, inputs), ir.VectorType(F32, LANES))
    builder.store(code.fused(products, scale, builder.load(total)), total)


def is_input(kind: Any) -> bool:
    """Whether a Numba type is that of `Input`."""
    return isinstance(kind, types.BaseTuple) and len(kind) == 6


def _unpacked(code: Code, value: Any, count: int) -> list[Any]:
    return [code.builder.extract_value(value, number) for number in range(count)]


def _generate(scaled: bool, like: Any, v: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        rows, ahead = _unpacked(code, args[1], 4), _unpacked(code, args[2], 4)
        data = [code.data(v[number], value) for number, value in enumerate(_unpacked(code, args[3], 6))]
        groups = builder.lshr(builder.add(args[4], I64(GROUP - 1)), I64(7))
        if like.dtype in FLOATS:
            sums = _float_dots(code, like.dtype, rows, ahead, data[0], args[4])
        elif like.dtype == types.int8:
            sums = _int8_dots(code, rows, ahead, data, groups, scaled)
        else:
            sums = _int4_dots(code, rows, ahead, data, groups)
        return cgutils.pack_array(builder, sums)

    return generate


_FOUR = types.UniTuple(types.int64, 4)


@intrinsic
def _dot_rows(typing_context: Any, like: Any, rows: Any, ahead: Any, v: Any, n: Any) -> Any:
    if not isinstance(like, types.Array) or like.dtype not in (*FLOATS, types.int8, types.uint8) or not is_input(v):
        return None
    signature = types.UniTuple(types.float32, 4)(like, _FOUR, _FOUR, v, types.int64)
    return signature, _generate(True, like, v)


@intrinsic
def dot_codes(typing_context: Any, like: Any, rows: Any, ahead: Any, v: Any, n: Any) -> Any:
    """`dot_four` for int8 codes without scales: rows like the int8 array `like`, padded with zeros to whole groups."""
    if not isinstance(like, types.Array) or like.dtype != types.int8 or not is_input(v):
        return None
    signature = types.UniTuple(types.float32, 4)(like, _FOUR, _FOUR, v, types.int64)
    return signature, _generate(False, like, v)


def _tails(like: np.ndarray, rows: Rows, v: Input, n: int, sums: tuple[float, ...]) -> tuple[float, ...]:
    raise NotImplementedError("called from compiled code only")


@overload(_tails, inline="always", strict=False)
def _add_tails(like: Any, rows: Any, v: Any, n: Any, sums: Any) -> Any:
    """Add what `_dot_rows` leaves: the last elements of rows of floats; blocks are padded and leave nothing."""
    if like.dtype not in FLOATS:
        return lambda like, rows, v, n, sums: sums
    size = like.dtype.bitwidth // 8

    def add(like, rows, v, n, sums):  # type: ignore[no-untyped-def]
        (r0, r1, r2, r3), (s0, s1, s2, s3) = rows, sums
        for j in range(n & -STEP, n):
            x = v[0][j]
            s0 += weight_at(like, r0 + j * size) * x
            s1 += weight_at(like, r1 + j * size) * x
            s2 += weight_at(like, r2 + j * size) * x
            s3 += weight_at(like, r3 + j * size) * x
        return s0, s1, s2, s3

    return add


@njit(nogil=True, inline="always")
def dot_four(like, rows, ahead, v, n):  # type: ignore[no-untyped-def]
    """The rows of `n` weights at four addresses times the input `v`, which `prepare` has brought into form: f32 x 4.

    Meanwhile the rows at the addresses `ahead` are fetched into L2; they may lie anywhere, as a fetch never faults.
    """
    return _tails(like, rows, v, n, _dot_rows(like, rows, ahead, v, n))
