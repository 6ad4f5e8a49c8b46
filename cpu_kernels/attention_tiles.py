"""Attention of a unit of queries that share their keys, 128 positions at a time, by tiles; see `prompt_attention.py`.

Rows of a unit are the query heads of one KV head for neighbouring tokens, token after token. Of each block of keys

    scores = queries . keys^T, softmax as far as it goes (online, arXiv 1805.02867), sums = sums * shrink + p . values

where keys and values are widened to f32 in the worker's own cache, once for all rows. A tile has 6 rows: it computes
the panels of keys that one of them sees, and adds the values from the first that one of them sees to the last.

Blocks begin at multiples of 128, wherever a piece of the prompt does; a score and a sum over one block's values have
one order, and p is 0 where a row sees nothing, which adds nothing. So a row's bits are the same in every unit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from cpu_kernels.attention import exp
from cpu_kernels.compiled import subroutine
from cpu_kernels.inputs import larger
from cpu_kernels.lanes import F32, FAST_SUMS, I64, LANES, Code, as_f32
from cpu_kernels.panels import aligned
from cpu_kernels.tiles import MOST_COLUMNS, TOKENS, panel_columns, row_tile

KEYS = 128  # of a block
ROWS = 192  # of a unit at most: to widen and transpose a block takes a tenth of the time of 128 rows' products


class Own(NamedTuple):
    """A worker's own, f32, W the head's size in whole panels: queries [192, W], scaled; scores [192, 128], then p;
    sums [192, W]; state [192, 2], the largest score and the sum of p; seen int64 [192, 2], the first position that a
    row sees and the one after the last; keys [W, 144], transposed; wide [128, W + 16], keys, then values."""

    queries: np.ndarray
    scores: np.ndarray
    sums: np.ndarray
    state: np.ndarray
    seen: np.ndarray
    keys: np.ndarray
    wide: np.ndarray


def new_own(head_dim: int) -> Own:
    """One worker's buffers."""
    width = -(-head_dim // MOST_COLUMNS) * MOST_COLUMNS
    # 16 more from row to row: rows a power of two apart share lines of the cache.
    return Own(
        queries=_table(ROWS, width),
        scores=_table(ROWS, KEYS),
        sums=_table(ROWS, width),
        state=_table(ROWS, 2),
        seen=np.zeros((ROWS, 2), np.int64),
        keys=_table(width, KEYS + LANES),
        wide=_table(KEYS, width + LANES),
    )


def _table(rows: int, columns: int) -> np.ndarray:
    return aligned(rows * columns, np.float32).reshape(rows, columns)


@intrinsic
def _transpose(typing_context: Any, source: Any, apart: Any, target: Any, width: Any) -> Any:
    """16 columns of f32 of 16 rows, `apart` bytes apart, to 16 rows `width` bytes apart; both addresses."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (source, apart, target, width) = Code(context, builder), args
        rows = [builder.add(source, builder.mul(apart, I64(number))) for number in range(LANES)]
        code.store_columns(code.transposed([code.load(row, F32, LANES, 0, 4) for row in rows]), target, width)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate


def _widen(row: np.ndarray, scales: np.ndarray | None, at: tuple[int, ...], out: np.ndarray) -> None:
    """out = a stored key or value, times scales[at] if it has one."""
    raise NotImplementedError("called from compiled code only")


@overload(_widen, strict=False, jit_options={"nogil": True, "forceinline": True})
def _widen_type(row: Any, scales: Any, at: Any, out: Any) -> Any:
    def floats(row, scales, at, out):  # type: ignore[no-untyped-def]
        for j in range(row.shape[0]):
            out[j] = as_f32(row[j])

    def codes(row, scales, at, out):  # type: ignore[no-untyped-def]
        scale = scales[at]
        for j in range(row.shape[0]):
            out[j] = as_f32(row[j]) * scale

    return floats if scales == types.none else codes


@subroutine
def _widen_block(cache, scales, table, which, g, base, low, high, wide):  # type: ignore[no-untyped-def]
    """wide[low:high] = keys, or values for `which` 1, of KV head g at positions from base + low to base + high."""
    block_size = cache.shape[3]
    i = low
    while i < high:
        block, slot = table[(base + i) // block_size], (base + i) % block_size
        run = min(high - i, block_size - slot)
        for n in range(run):
            _widen(cache[block, which, g, slot + n], scales, (block, which, g, slot + n), wide[i + n])
        i += run


@subroutine
def _begin(qkv, group, g, first, rows, start, window, own):  # type: ignore[no-untyped-def]
    """Rows [first, first + rows) of KV head g, of `group` query heads, into the worker's buffers."""
    head_dim = qkv.shape[2]
    scale = np.float32(1 / math.sqrt(head_dim))
    for r in range(-(-rows // TOKENS) * TOKENS):
        token, head = (first + r) // group, g * group + (first + r) % group
        for j in range(own.sums.shape[1]):
            own.sums[r, j] = 0
        for j in range(head_dim):
            own.queries[r, j] = 0  # of rows that only fill the last tile
        if r < rows:
            for j in range(head_dim):
                own.queries[r, j] = qkv[token, head, j] * scale
        own.state[r, 0] = -np.inf
        own.state[r, 1] = 0
        end = start + token + 1
        own.seen[r, 0] = max(end - window, 0) if window else 0
        own.seen[r, 1] = end


@subroutine(forceinline=True)
def _seen(seen, first, last, base):  # type: ignore[no-untyped-def]
    """The first of a block's keys that one of these rows sees, and the one after the last."""
    return max(seen[first, 0] - base, 0), min(seen[last, 1] - base, KEYS)


@subroutine
def _score(rows, head_dim, base, low, high, own):  # type: ignore[no-untyped-def]
    """own.scores of the block's keys [low, high), in panels; others stay as they were."""
    columns = panel_columns()
    wide, keys, queries = own.wide.strides[0], own.keys.strides[0], own.queries.strides[0]
    for i in range(low & -LANES, high, LANES):
        for j in range(0, head_dim, LANES):
            at = own.wide.ctypes.data + i * wide + 4 * j
            _transpose(at, wide, own.keys.ctypes.data + j * keys + 4 * i, keys)
    for first in range(low // columns * columns, high, columns):
        for r in range(0, rows, TOKENS):
            begin, end = _seen(own.seen, r, min(r + TOKENS, rows) - 1, base)
            if begin < first + columns and end > first:
                for n in range(r, r + TOKENS):
                    for i in range(first, first + columns):
                        own.scores[n, i] = 0
                x, out = own.queries.ctypes.data + r * queries, own.scores.ctypes.data + (r * KEYS + first) * 4
                row_tile(own.keys.ctypes.data + 4 * first, keys, x, queries, head_dim, out, KEYS * 4)


@subroutine(fastmath=FAST_SUMS, forceinline=True)
def _weigh_row(scores, state, sums):  # type: ignore[no-untyped-def]
    """Scores become p = e^(score - largest so far); what was summed before shrinks to the new largest."""
    largest = state[0]
    for i in range(scores.shape[0]):
        largest = larger(largest, scores[i])
    shrink, total = exp(state[0] - largest), np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    state[0] = largest
    state[1] = state[1] * shrink + total
    if shrink != 1:
        for j in range(sums.shape[0]):
            sums[j] *= shrink


@subroutine
def _weigh(rows, base, own):  # type: ignore[no-untyped-def]
    """Scores of the block to p, 0 where a row sees nothing that another of its tile does."""
    for r in range(rows):
        first, end = _seen(own.seen, r, r, base)
        if first < end:
            _weigh_row(own.scores[r, first:end], own.state[r], own.sums[r])
        tile = r // TOKENS * TOKENS
        low, high = _seen(own.seen, tile, min(tile + TOKENS, rows) - 1, base)
        for i in range(low, min(first, high)):
            own.scores[r, i] = 0
        for i in range(max(end, low), high):
            own.scores[r, i] = 0


@subroutine
def _add_values(rows, head_dim, base, own):  # type: ignore[no-untyped-def]
    """own.sums += p . values of the block."""
    wide, sums = own.wide.strides[0], own.sums.strides[0]
    for first in range(0, head_dim, panel_columns()):
        for r in range(0, rows, TOKENS):
            low, high = _seen(own.seen, r, min(r + TOKENS, rows) - 1, base)
            if low < high:
                values = own.wide.ctypes.data + low * wide + 4 * first
                x, out = own.scores.ctypes.data + (r * KEYS + low) * 4, own.sums.ctypes.data + r * sums + 4 * first
                row_tile(values, wide, x, KEYS * 4, high - low, out, sums)


@subroutine
def attend_unit(qkv, cache, scales, table, g, first, rows, start, window, own, out):  # type: ignore[no-untyped-def]
    """out of the rows [first, first + rows) of KV head g: the keys and values of all tokens are in the cache.

    qkv: [t, heads, head_dim] of tokens from position `start` on, queries first; window: 0 for none; out: as qkv, of
    queries alone.
    """
    group, head_dim = out.shape[1] // cache.shape[2], out.shape[2]
    _begin(qkv, group, g, first, rows, start, window, own)
    keys, values = np.int64(0), np.int64(1)
    oldest, end = own.seen[0, 0], own.seen[rows - 1, 1]
    for block in range(oldest // KEYS, (end - 1) // KEYS + 1):
        base = block * KEYS
        low, high = max(oldest - base, 0), min(end - base, KEYS)
        _widen_block(cache, scales, table, keys, g, base, low, high, own.wide)
        _score(rows, head_dim, base, low, high, own)
        _weigh(rows, base, own)
        _widen_block(cache, scales, table, values, g, base, low, high, own.wide)
        _add_values(rows, head_dim, base, own)
    for r in range(rows):
        token, head, total = (first + r) // group, g * group + (first + r) % group, own.state[r, 1]
        for j in range(head_dim):
            out[token, head, j] = own.sums[r, j] / total
