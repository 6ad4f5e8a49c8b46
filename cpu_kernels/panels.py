"""Weights and tokens in the forms that tiles multiply, floats or codes (`tiles.py`), or bf16 terms (`terms.py`).

Floats are the weights as they are, in f32. Codes are integers with a scale for each block of 32: those of rows in
blocks as they are stored, with tokens rounded to 16 bits as decode rounds its inputs (`inputs.py`). All else is rounded
to 14 bits, weights and tokens, 1 part in 16,382 of the largest of its block: 32 products of two such codes are the most
that an integer of 32 bits holds, whatever they are. bf16 keeps 8 bits of each weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import barrier
from cpu_kernels.blocks import padded
from cpu_kernels.compiled import subroutine
from cpu_kernels.contract import BLOCK, GROUP, Precision
from cpu_kernels.inputs import LARGEST, ROUND, largest
from cpu_kernels.lanes import F32, I16, I32, I64, LANES, Code, constant
from cpu_kernels.row_type import Panel
from cpu_kernels.row_types import in_blocks, type_like
from cpu_kernels.terms import (
    THREE_TERMS,
    TWO_TERMS,
    in_terms,
    pack_row_terms,
    pack_sum_terms,
    pack_token_terms,
    terms_in,
)
from cpu_kernels.tile_unit import ROWS, tiles_usable
from cpu_kernels.tiles import TOKENS, panel_columns
from cpu_kernels.widen import widen_columns

UNIT = 128  # rows, or columns of a sum of rows, of one piece of work at most
MOST = np.float32(8191)  # code of weights and tokens that are both rounded
_TINY = 1e-30  # a block whose largest is below has codes of 0
_SPACING = GROUP + LANES  # f32 from one widened row to the next: rows a power of two apart share lines of the cache

# Arrays whose type says which form is meant, as `like` says how rows are stored.
FLOATS, CODES = np.empty(0, np.float32), np.empty(0, np.int16)


def form_of(precision: Precision) -> np.ndarray:
    """The form that products of this precision take on this CPU: terms where it has a tile unit."""
    if tiles_usable():
        return THREE_TERMS if precision == "precise" else TWO_TERMS
    return FLOATS if precision == "precise" else CODES


class Tokens(NamedTuple):
    """Tokens as tiles read them, 6 side by side, 128 columns of all of them after the other: f32
    [P / 128, groups, 128, 6]; or pairs of codes, int32 [P / 128, groups, 64, 6], with scales f32 [P / 128, groups, 4,
    6]; or terms, bf16 as uint16 (`terms.py`). As addresses need no shapes, each is a vector."""

    floats: np.ndarray
    pairs: np.ndarray
    scales: np.ndarray
    terms: np.ndarray


class Own(NamedTuple):
    """A worker's own: panels of a unit with their scales, rows widened, 32 codes of a token, or room for 32 f32 of it,
    and f32 [2, tokens, 128] results of a unit."""

    panels: np.ndarray
    scales: np.ndarray
    wide: np.ndarray
    codes: np.ndarray
    results: np.ndarray


def groups_of(tokens: int) -> int:
    """Groups of 6 tokens."""
    return -(-tokens // TOKENS)


def new_tokens(tokens: int, columns: int, form: np.ndarray) -> Tokens:
    """Room for so many tokens of up to `columns` columns, in one form."""
    n = groups_of(tokens) * TOKENS * padded(columns)
    floats, codes = (n if form is FLOATS else 0), (n if form is CODES else 0)
    terms = -(-tokens // ROWS) * ROWS * padded(columns) * terms_in(form)
    return Tokens(
        aligned(floats, np.float32),
        aligned(codes // 2, np.int32),
        aligned(codes // BLOCK, np.float32),
        aligned(terms, np.uint16),
    )


def new_own(tokens: int, form: np.ndarray) -> Own:
    """One worker's buffers for so many tokens in one form."""
    of_tile = ROWS if terms_in(form) else TOKENS
    rows = -(-tokens // of_tile) * of_tile  # the last tile adds what its other tokens would have
    return Own(
        panels=aligned(UNIT * GROUP * max(2, terms_in(form)) // 2, np.float32),  # of up to as many terms
        scales=aligned(UNIT * GROUP // BLOCK, np.float32),
        wide=aligned(GROUP * _SPACING, np.float32).reshape(GROUP, _SPACING),
        codes=aligned(2 * BLOCK, np.int16),
        results=aligned(2 * rows * UNIT, np.float32).reshape(2, rows, UNIT),
    )


def aligned(count: int, dtype: Any) -> np.ndarray:
    """Zeros that begin at a line of the cache."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    skipped = -raw.ctypes.data % 64
    return raw[skipped : len(raw) - 64 + skipped].view(dtype)


@intrinsic
def in_codes(typing_context: Any, form: Any) -> Any:
    """Whether an array like `form` means codes."""
    number = I64(int(form.dtype == types.int16))
    return types.int64(form), lambda context, builder, signature, args: number


@subroutine
def pack_columns(form, most, x, count, first, t, tokens, codes, packed):  # type: ignore[no-untyped-def]
    """x[:count], columns of token t from `first` on, a multiple of 32, up to the next multiple of 128 at most, into
    their place; as codes of up to `most`, the last block filled up with zeros."""
    if in_terms(form):
        pack_token_terms(form, x, count, first, t, tokens, codes.view(np.float32), packed)
        return
    groups, begin = (tokens + TOKENS - 1) // TOKENS, first % GROUP
    place, t = ((first - begin) * groups + t // TOKENS * GROUP + begin) * TOKENS, t % TOKENS
    if not in_codes(form):
        for k in range(count):
            packed.floats[place + k * TOKENS + t] = x[k]
        return
    pairs = codes.view(np.int32)
    for block in range(0, count, BLOCK):
        end = min(block + BLOCK, count)
        top = largest(x, block, end)
        inverse = most / top if top > np.float32(_TINY) else np.float32(0)
        if end < block + BLOCK:
            codes[:BLOCK] = 0
        for k in range(block, end):
            codes[k - block] = np.int16(np.float32(x[k] * inverse + ROUND).view(np.int32))
        at = (place + block * TOKENS) // 2 + t
        for pair in range(BLOCK // 2):
            packed.pairs[at + pair * TOKENS] = pairs[pair]
        packed.scales[(place + block * TOKENS) // BLOCK + t] = top / most


@subroutine
def pack_tokens(state, form, like, x, own, packed):  # type: ignore[no-untyped-def]
    """Bring the tokens x [t, d] into the form that rows like `like` are multiplied with; workers share the groups."""
    tokens, d = x.shape
    most = LARGEST if in_blocks(like) else MOST
    g = barrier.take(state)
    while g * TOKENS < tokens:
        for t in range(g * TOKENS, min(g * TOKENS + TOKENS, tokens)):
            for first in range(0, d, GROUP):
                pack_columns(form, most, x[t, first:], min(GROUP, d - first), first, t, tokens, own.codes, packed)
        g = barrier.take(state)


@intrinsic
def _stored_codes(
    typing_context: Any, like: Any, row: Any, row_bytes: Any, count: Any, group: Any, end: Any, pairs: Any, scales: Any,
    width: Any,
) -> Any:  # fmt: skip
    """`RowType.panel` of 16 rows from the address `row` on; of fewer, `count`, the last again."""
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not kind.layout.in_blocks:
            return context.get_dummy_value()  # never called
        code, (_, row, row_bytes, count, group, end, pairs, scales, width) = Code(context, builder), args
        last, rows = builder.sub(count, I64(1)), []
        for number in range(LANES):
            some = builder.select(builder.icmp_signed("<", I64(number), count), I64(number), last)
            rows.append(builder.add(row, builder.mul(some, row_bytes)))
        kind.panel(code, rows, group, end, Panel(pairs, scales, width))
        return context.get_dummy_value()

    return types.void(like, *(types.int64,) * 8), generate


def _rounded(code: Code, value: Any, inverse: Any) -> Any:
    """i32 [16] whose low 16 bits are value * inverse, rounded."""
    number = code.fused(value, inverse, constant(F32, float(ROUND), LANES))
    return code.builder.bitcast(number, ir.VectorType(I32, LANES))


def _pairs(code: Code, first: Any, second: Any) -> Any:
    """i32 [16] of codes side by side: the low 16 bits of `first` below those of `second`."""
    low = code.builder.and_(first, constant(I32, 0xFFFF, LANES))
    return code.builder.or_(low, code.builder.shl(second, constant(I32, 16, LANES)))


def _scale_of(code: Code, tops: list[Any], at: Any) -> Any:
    """Store the scales of 16 blocks, from vectors whose largest are theirs; returns what their weights are multiplied
    with."""
    builder, wide = code.builder, ir.VectorType(F32, LANES)
    while len(tops) > 1:
        tops = [
            builder.select(builder.fcmp_ordered(">", a, b), a, b) for a, b in zip(tops[::2], tops[1::2], strict=True)
        ]
    most = constant(F32, float(MOST), LANES)
    code.store(builder.fdiv(tops[0], most), at)
    inverse = builder.fdiv(most, tops[0])
    there = builder.fcmp_ordered(">", tops[0], constant(F32, _TINY, LANES))
    return builder.select(there, inverse, ir.Constant(wide, [0.0] * LANES))


def _magnitude(code: Code, value: Any) -> Any:
    bits = code.builder.bitcast(value, ir.VectorType(I32, LANES))
    cleared = code.builder.and_(bits, constant(I32, 0x7FFFFFFF, LANES))
    return code.builder.bitcast(cleared, ir.VectorType(F32, LANES))


@intrinsic
def _turned_rows(typing_context: Any, rows: Any, stride: Any, columns: Any, panel: Any, width: Any) -> Any:
    """Columns of 16 rows of f32, `stride` bytes apart, a multiple of 16 of them, side by side in a panel of floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (rows, stride, columns, panel, width) = Code(context, builder), args
        starts = [builder.add(rows, builder.mul(stride, I64(number))) for number in range(LANES)]
        with cgutils.for_range_slice(builder, I64(0), columns, I64(LANES), intp=I64) as (at, _):
            wide = [code.load(builder.add(row, builder.mul(at, I64(4))), F32, LANES, 0, 4) for row in starts]
            code.store_columns(code.transposed(wide), builder.add(panel, builder.mul(at, width)), width)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), generate


@intrinsic
def _rounded_rows(typing_context: Any, rows: Any, stride: Any, blocks: Any, pairs: Any, scales: Any, width: Any) -> Any:
    """Blocks of 16 rows of f32, `stride` bytes apart, side by side in a panel of codes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (rows, stride, blocks, pairs, scales, width) = Code(context, builder), args
        starts = [builder.add(rows, builder.mul(stride, I64(number))) for number in range(LANES)]
        with code.each(blocks) as loop:
            offset = builder.mul(loop.index, I64(4 * BLOCK))
            halves = [
                [code.load(builder.add(row, offset), F32, LANES, 4 * LANES * half, 4) for half in range(2)]
                for row in starts
            ]
            tops = []
            for a, b in halves:
                a, b = _magnitude(code, a), _magnitude(code, b)
                tops.append(builder.select(builder.fcmp_ordered(">", a, b), a, b))
            at = builder.add(scales, builder.mul(loop.index, width))
            inverse = _scale_of(code, code.transposed(tops), at)
            turned, short = [], ir.VectorType(I16, LANES)
            for number, row in enumerate(halves):
                factor = code.lane(inverse, number)
                a, b = (builder.trunc(_rounded(code, half, factor), short) for half in row)
                both = code.picked(a, b, list(range(2 * LANES)))
                turned.append(builder.bitcast(both, ir.VectorType(I32, LANES)))
            line = builder.add(pairs, builder.mul(loop.index, builder.mul(width, I64(BLOCK // 2))))
            code.store_columns(code.transposed(turned), line, width)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), generate


@intrinsic
def _rounded_columns(
    typing_context: Any, rows: Any, stride: Any, blocks: Any, pairs: Any, scales: Any, width: Any
) -> Any:
    """Blocks of 32 rows of f32, `stride` bytes apart, of 16 columns, in a panel of codes of sums over rows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (rows, stride, blocks, pairs, scales, width) = Code(context, builder), args
        with code.each(blocks) as loop:
            start = builder.add(rows, builder.mul(loop.index, builder.mul(stride, I64(BLOCK))))
            column = [
                code.load(builder.add(start, builder.mul(stride, I64(number))), F32, LANES, 0, 4)
                for number in range(BLOCK)
            ]
            at = builder.add(scales, builder.mul(loop.index, width))
            inverse = _scale_of(code, [_magnitude(code, value) for value in column], at)
            line = builder.add(pairs, builder.mul(loop.index, builder.mul(width, I64(BLOCK // 2))))
            codes = [_rounded(code, value, inverse) for value in column]
            code.store_columns([_pairs(code, a, b) for a, b in zip(codes[::2], codes[1::2], strict=True)], line, width)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), generate


@subroutine
def pack_rows(form, like, row, row_bytes, count, first, last, end, own):  # type: ignore[no-untyped-def]
    """Columns [first, last), at most 128 from a multiple of 128 on, of `count` rows from the address `row` on, into the
    worker's panels."""
    if in_terms(form):
        pack_row_terms(form, like, row, row_bytes, count, first, last, end, own)
        return
    columns, stride = panel_columns(), own.wide.strides[0]
    panels, scales, wide = own.panels.ctypes.data, own.scales.ctypes.data, own.wide.ctypes.data
    stored = in_codes(form) and in_blocks(like)
    if not stored:
        for i in range(count):
            widen_columns(like, row + i * row_bytes, first, last, end, own.wide[i])
            own.wide[i, last - first : (last - first + BLOCK - 1) & -BLOCK] = 0
    for r in range(0, count, LANES):
        panel, at = r // columns, 4 * (r % columns)
        weights = panels + panel * GROUP * columns * 4 + at
        of = scales + panel * (GROUP // BLOCK) * columns * 4 + at
        if stored:
            some = min(LANES, count - r)
            _stored_codes(like, row + r * row_bytes, row_bytes, some, first // GROUP, end, weights, of, columns * 4)
        elif in_codes(form):
            blocks = (last - first + BLOCK - 1) // BLOCK
            _rounded_rows(wide + r * stride, stride, blocks, weights, of, columns * 4)
        else:
            _turned_rows(wide + r * stride, stride, (last - first + LANES - 1) & -LANES, weights, columns * 4)


@subroutine
def pack_sums(form, like, row, row_bytes, count, first, last, end, own):  # type: ignore[no-untyped-def]
    """Columns [first, last) as `pack_rows` has them, of `count` rows, at most 128, for a sum over the rows; floats
    stay in own.wide, where tiles find them."""
    if in_terms(form):
        pack_sum_terms(form, like, row, row_bytes, count, first, last, end, own)
        return
    columns, stride = panel_columns(), own.wide.strides[0]
    for i in range(count):
        widen_columns(like, row + i * row_bytes, first, last, end, own.wide[i])
    if not in_codes(form):
        return
    blocks = (count + BLOCK - 1) // BLOCK
    own.wide[count : blocks * BLOCK] = 0
    for c in range(0, last - first, LANES):
        panel, at = c // columns, 4 * (c % columns)
        pairs = own.panels.ctypes.data + panel * GROUP * columns * 4 + at
        scales = own.scales.ctypes.data + panel * (GROUP // BLOCK) * columns * 4 + at
        _rounded_columns(own.wide.ctypes.data + 4 * c, stride, blocks, pairs, scales, columns * 4)
