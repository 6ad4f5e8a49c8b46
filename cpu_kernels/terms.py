"""Weights and tokens as sums of bf16 terms, each the nearest to what those before leave, and their products in tiles.

Tokens are two terms (`fast`), 17 bits, or three (`precise`), all 24 bits of an f32. Weights are as many as hold them
exactly, at most as many as tokens: one of bf16, two of f16 and int4. Of the products of terms those are taken that
matter: the i-th of a token times the j-th of a weight where i + j is below the number of a token's terms. What is left
out is at most 2^-17, or 2^-25, of the product.

All lies as tiles of 1,024 bytes. Of tokens 16 x 32 columns, the terms of a tile one after another, then the next 32 of
128 columns, then the next 16 tokens, then the next 128 columns. Of weights 16 pairs of columns x 16 rows x 2 for
`products`, or 16 pairs of rows x 16 columns x 2 for sums of rows; terms one after another, then the next pairs of 128,
then the next 16 rows, or columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import tile_unit
from cpu_kernels.compiled import subroutine
from cpu_kernels.contract import GROUP
from cpu_kernels.lanes import F32, I16, I32, I64, LANES, Code, constant
from cpu_kernels.row_sum import column_bytes
from cpu_kernels.row_type import RowType
from cpu_kernels.row_types import type_like
from cpu_kernels.tile_unit import ROWS, TILE_BYTES
from cpu_kernels.widen import fetch_columns, widen_columns

# Forms as `panels.py` has others: arrays of as many axes as a token has terms.
TWO_TERMS, THREE_TERMS = np.empty((0, 0), np.uint16), np.empty((0, 0, 0), np.uint16)
STEP = 32  # columns of a tile
_STEPS = GROUP // STEP
_AHEAD = 16  # rows that are fetched with a tile: all of a unit's with those of 64 tokens


def terms_in(form: Any) -> int:
    """Terms of a token in a form, an array or its Numba type; 0 in one without."""
    return int(form.ndim) if str(form.dtype) == "uint16" else 0


def term_products(form: Any, kind: RowType) -> int:
    """Products of terms for each product of a weight and a token."""
    return sum(terms_in(form) - j for j in range(min(terms_in(form), kind.terms)))


def _weight_terms(form: Any, like: Any) -> int:
    return min(terms_in(form), type_like(like).terms)


@intrinsic
def in_terms(typing_context: Any, form: Any) -> Any:
    """Whether an array like `form` means bf16 terms."""
    number = I64(int(terms_in(form) > 0))
    return types.int64(form), lambda context, builder, signature, args: number


@intrinsic
def _token_bytes(typing_context: Any, form: Any) -> Any:
    """Bytes of 128 columns of 16 tokens."""
    number = I64(_STEPS * terms_in(form) * TILE_BYTES)
    return types.int64(form), lambda context, builder, signature, args: number


@intrinsic
def _panel_bytes(typing_context: Any, form: Any, like: Any) -> Any:
    """Bytes of 128 columns of 16 rows, or of 128 rows of 16 columns."""
    number = I64(_STEPS * _weight_terms(form, like) * TILE_BYTES)
    return types.int64(form, like), lambda context, builder, signature, args: number


@intrinsic
def _as_they_are(typing_context: Any, like: Any) -> Any:
    """Whether weights are bf16, which need no splitting."""
    number = I64(int(type_like(like).terms == 1))
    return types.int64(like), lambda context, builder, signature, args: number


def _split(code: Code, value: Any, count: int) -> list[Any]:
    """The terms of f32 [16], each i32 [16] whose upper half is 0."""
    builder, found = code.builder, []
    for number in range(count):
        bits = builder.bitcast(value, ir.VectorType(I32, LANES))
        odd = builder.and_(builder.lshr(bits, constant(I32, 16, LANES)), constant(I32, 1, LANES))
        up = builder.add(builder.add(bits, constant(I32, 0x7FFF, LANES)), odd)
        found.append(builder.lshr(up, constant(I32, 16, LANES)))
        if number + 1 < count:
            term = builder.and_(up, constant(I32, -0x10000, LANES))
            value = builder.fsub(value, builder.bitcast(term, ir.VectorType(F32, LANES)))
    return found


def _paired(code: Code, first: Any, second: Any) -> Any:
    """i32 [16] of terms side by side, `first` below."""
    return code.builder.or_(first, code.builder.shl(second, constant(I32, 16, LANES)))


def _in_columns(code: Code, first: Any, second: Any) -> Any:
    """i32 [16] of 32 terms in the order of columns, from those of the first 16 and of the second."""
    short = ir.VectorType(I16, LANES)
    a, b = code.builder.trunc(first, short), code.builder.trunc(second, short)
    return code.builder.bitcast(code.picked(a, b, list(range(2 * LANES))), ir.VectorType(I32, LANES))


@intrinsic
def _split_token(typing_context: Any, form: Any, x: Any, out: Any) -> Any:
    """32 columns of a token, f32 at address `x`, as terms from address `out` on, a tile from one to the next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (_, x, out) = Code(context, builder), args
        halves = [_split(code, code.load(x, F32, LANES, 4 * LANES * half, 4), terms_in(form)) for half in range(2)]
        for number, (first, second) in enumerate(zip(*halves, strict=True)):
            code.store(_in_columns(code, first, second), builder.add(out, I64(number * TILE_BYTES)))
        return context.get_dummy_value()

    return types.void(form, types.int64, types.int64), generate


@subroutine
def pack_token_terms(form, x, count, first, t, tokens, spare, packed):  # type: ignore[no-untyped-def]
    """x[:count], columns of token t from `first` on, a multiple of 32, up to the next multiple of 128 at most, into
    their place; the last 32 are filled up with zeros. spare: room for 32 f32."""
    groups, size = (tokens + ROWS - 1) // ROWS, _token_bytes(form)
    step = size // _STEPS
    place = packed.terms.ctypes.data + (first // GROUP * groups + t // ROWS) * size + t % ROWS * STEP * 2
    place += first % GROUP // STEP * step
    for column in range(0, count, STEP):
        at = x[column:].ctypes.data
        if column + STEP > count:
            spare[:] = 0
            for k in range(column, count):
                spare[k - column] = x[k]
            at = spare.ctypes.data
        _split_token(form, at, place + column // STEP * step)


@intrinsic
def _stored_rows(
    typing_context: Any, form: Any, like: Any, row: Any, row_bytes: Any, count: Any, steps: Any, panel: Any
) -> Any:
    """Columns of 16 rows of bf16 from the address `row` on, 32 a step, as tiles; of fewer rows the last again."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if type_like(like).terms > 1:
            return context.get_dummy_value()  # never called
        code, (_, _, row, row_bytes, count, steps, panel) = Code(context, builder), args
        last, starts = builder.sub(count, I64(1)), []
        for number in range(LANES):
            some = builder.select(builder.icmp_signed("<", I64(number), count), I64(number), last)
            starts.append(builder.add(row, builder.mul(some, row_bytes)))
        with code.each(steps) as loop:
            at, to = (builder.mul(loop.index, I64(size)) for size in (2 * STEP, TILE_BYTES))
            pairs = [code.load(builder.add(start, at), I32, LANES) for start in starts]
            code.store_columns(code.transposed(pairs), builder.add(panel, to), tile_unit.row_stride())
        return context.get_dummy_value()

    return types.void(form, like, *(types.int64,) * 5), generate


@intrinsic
def _split_rows(typing_context: Any, form: Any, like: Any, rows: Any, stride: Any, steps: Any, panel: Any) -> Any:
    """Columns of 16 rows of f32, `stride` bytes apart, 32 a step, as tiles of their terms."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (_, _, rows, stride, steps, panel), count = Code(context, builder), args, _weight_terms(form, like)
        starts = [builder.add(rows, builder.mul(stride, I64(number))) for number in range(LANES)]
        with code.each(steps) as loop:
            at, to = (builder.mul(loop.index, I64(size)) for size in (4 * STEP, count * TILE_BYTES))
            of_rows = []
            for start in starts:
                halves = [
                    _split(code, code.load(builder.add(start, at), F32, LANES, 4 * LANES * half, 4), count)
                    for half in range(2)
                ]
                of_rows.append([_in_columns(code, *both) for both in zip(*halves, strict=True)])
            for number, pairs in enumerate(zip(*of_rows, strict=True)):
                tile = builder.add(builder.add(panel, to), I64(number * TILE_BYTES))
                code.store_columns(code.transposed(list(pairs)), tile, tile_unit.row_stride())
        return context.get_dummy_value()

    return types.void(form, like, *(types.int64,) * 4), generate


def _sum_rows(form: Any, like: Any, element: Any, terms: Any, args: Any, code: Code) -> None:
    """The code of the two that follow. terms: of 16 columns at an address, each i32 [16] whose upper half is 0."""
    builder, (rows, stride, pairs, columns, panel) = code.builder, args
    count = _weight_terms(form, like)
    with code.each(pairs) as loop:
        row = builder.add(rows, builder.mul(loop.index, builder.shl(stride, I64(1))))
        step, line = builder.lshr(loop.index, I64(4)), builder.and_(loop.index, I64(ROWS - 1))
        to = builder.add(panel, builder.mul(step, I64(count * TILE_BYTES)))
        to = builder.add(to, builder.mul(line, tile_unit.row_stride()))
        with cgutils.for_range_slice(builder, I64(0), columns, I64(LANES), intp=I64) as (column, _):
            at = builder.add(row, builder.mul(column, I64(element)))
            both = zip(terms(at), terms(builder.add(at, stride)), strict=True)
            place = builder.add(to, builder.mul(column, I64(_STEPS * count * TILE_BYTES // LANES)))
            for number, (first, second) in enumerate(both):
                code.store(_paired(code, first, second), builder.add(place, I64(number * TILE_BYTES)))


@intrinsic
def _stored_sums(
    typing_context: Any, form: Any, like: Any, rows: Any, stride: Any, pairs: Any, columns: Any, panel: Any
) -> Any:
    """Pairs of rows of bf16 from the address `rows` on, of which columns, a multiple of 16, are summed, as tiles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)

        def terms(at: Any) -> list[Any]:
            return [builder.zext(code.load(at, I16, LANES, 0, 2), ir.VectorType(I32, LANES))]

        if type_like(like).terms == 1:  # never called otherwise
            _sum_rows(form, like, 2, terms, args[2:], code)
        return context.get_dummy_value()

    return types.void(form, like, *(types.int64,) * 5), generate


@intrinsic
def _split_sums(
    typing_context: Any, form: Any, like: Any, rows: Any, stride: Any, pairs: Any, columns: Any, panel: Any
) -> Any:
    """As `_stored_sums`, of rows of f32, as tiles of their terms."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, count = Code(context, builder), _weight_terms(form, like)

        def terms(at: Any) -> list[Any]:
            return _split(code, code.load(at, F32, LANES, 0, 4), count)

        _sum_rows(form, like, 4, terms, args[2:], code)
        return context.get_dummy_value()

    return types.void(form, like, *(types.int64,) * 5), generate


@subroutine
def pack_row_terms(form, like, row, row_bytes, count, first, last, end, own):  # type: ignore[no-untyped-def]
    """As `panels.pack_rows`, in tiles of terms."""
    columns, panels, place, stride = last - first, own.panels.ctypes.data, _panel_bytes(form, like), own.wide.strides[0]
    steps = (columns + STEP - 1) // STEP
    if _as_they_are(like) and columns % STEP == 0:
        at = row + column_bytes(like, first)
        for r in range(0, count, ROWS):
            to = panels + r // ROWS * place
            _stored_rows(form, like, at + r * row_bytes, row_bytes, min(ROWS, count - r), steps, to)
        return
    for i in range(count):
        widen_columns(like, row + i * row_bytes, first, last, end, own.wide[i])
        own.wide[i, columns : steps * STEP] = 0
    for r in range(0, count, ROWS):
        _split_rows(form, like, own.wide.ctypes.data + r * stride, stride, steps, panels + r // ROWS * place)


@subroutine
def pack_sum_terms(form, like, row, row_bytes, count, first, last, end, own):  # type: ignore[no-untyped-def]
    """As `panels.pack_sums`, in tiles of terms."""
    columns, panels = last - first, own.panels.ctypes.data
    if _as_they_are(like) and columns % LANES == 0 and count % STEP == 0:
        _stored_sums(form, like, row + column_bytes(like, first), row_bytes, count // 2, columns, panels)
        return
    for i in range(count):
        widen_columns(like, row + i * row_bytes, first, last, end, own.wide[i])
    rows = (count + STEP - 1) & -STEP
    own.wide[count:rows] = 0
    columns = (columns + LANES - 1) & -LANES
    _split_sums(form, like, own.wide.ctypes.data, own.wide.strides[0], rows // 2, columns, panels)


def _tile(groups: int) -> Any:
    """Tiles of 16 * groups tokens by 32 rows of weights, or columns of sums."""

    @intrinsic
    def tile(typing_context: Any, form: Any, like: Any, panel: Any, x: Any, steps: Any, out: Any, stride: Any) -> Any:
        """out[t, 32] += over 32 * steps columns; f32 at an address, tokens `stride` bytes apart."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not terms_in(form):
                return context.get_dummy_value()  # never called
            code, (_, _, panel, x, steps, out, stride) = Code(context, builder), args
            unit, of_token, of_weight = tile_unit.TileUnit(code), terms_in(form), _weight_terms(form, like)
            line, sums, inputs, weights = tile_unit.row_stride(), (0, 1, 2, 3), (4, 5), (6, 7)
            places = {}
            for token in range(groups):
                row = builder.add(out, builder.mul(stride, I64(ROWS * token)))
                for half in range(2):
                    place = builder.add(row, I64(half * 4 * LANES))
                    places[sums[2 * token + half]] = place
                    unit.load(sums[2 * token + half], place, stride)
            with code.each(steps) as loop:
                at = builder.add(panel, builder.mul(loop.index, I64(of_weight * TILE_BYTES)))
                of = builder.add(x, builder.mul(loop.index, I64(of_token * TILE_BYTES)))
                for j in range(of_weight):
                    for half in range(2):
                        other = half * _STEPS * of_weight + j
                        unit.load(weights[half], builder.add(at, I64(other * TILE_BYTES)), line)
                    for i in range(of_token - j):
                        for token in range(groups):
                            other = token * _STEPS * of_token + i
                            unit.load(inputs[token], builder.add(of, I64(other * TILE_BYTES)), line)
                            for half in range(2):
                                unit.dot(sums[2 * token + half], inputs[token], weights[half])
            for number, place in places.items():
                unit.store(number, place, stride)
            return context.get_dummy_value()

        return types.void(form, like, *(types.int64,) * 5), generate

    return tile


_tile_1, _tile_2 = _tile(1), _tile(2)


def _unit_call(name: str) -> Any:
    @intrinsic
    def call(typing_context: Any, form: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if terms_in(form):
                getattr(tile_unit.TileUnit(Code(context, builder)), name)()
            return context.get_dummy_value()

        return types.void(form), generate

    return call


# Before the first product of a worker's unit of work and after the last; nothing in forms without terms.
begin_tiles, end_tiles = _unit_call("configure"), _unit_call("release")


@subroutine
def add_term_tiles(  # type: ignore[no-untyped-def]
    form, like, own, x, some, tokens, k, count, first, which, ahead, row_bytes, coming, wide
):  # fmt: skip
    """own.results[which, t, :count] += the panels times `k` columns of the inputs of `some` tokens from `first` on.

    Meanwhile what is packed next is fetched, `wide` columns from the address `ahead` on of `coming` rows: some with
    every tile, as many at once would be waited for.
    """
    groups, steps, size = (tokens + ROWS - 1) // ROWS, (k + STEP - 1) // STEP, _token_bytes(form)
    panels, place, stride = own.panels.ctypes.data, _panel_bytes(form, like), own.results.strides[1]
    inputs, results = x.terms.ctypes.data + first // GROUP * groups * size, own.results[which].ctypes.data
    end, fetched = (some[1] + ROWS - 1) // ROWS, 0
    for g in range(some[0] // ROWS, end, 2):
        for c in range(0, count, 2 * LANES):
            if fetched < coming:
                fetch_columns(like, ahead + fetched * row_bytes, row_bytes, min(_AHEAD, coming - fetched), 0, wide)
                fetched += _AHEAD
            weights, to = panels + c // LANES * place, results + g * ROWS * stride + 4 * c
            if g + 1 < end:
                _tile_2(form, like, weights, inputs + g * size, steps, to, stride)
            else:
                _tile_1(form, like, weights, inputs + g * size, steps, to, stride)
    if fetched < coming:
        fetch_columns(like, ahead + fetched * row_bytes, row_bytes, coming - fetched, 0, GROUP)
