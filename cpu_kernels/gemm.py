"""GEMM: y[t] = W x[t] of many tokens, as prompts have them, by tiles (`tiles.py`) of 6 tokens.

Weights are read as they are stored, once for all tokens: 128 rows by 128 columns become panels in the worker's own
cache, floats as f32, codes of blocks as 16-bit integers, and all tokens are multiplied with them. Tokens are brought
into the tiles' form once: f32, or for rows in blocks rounded to 16 bits as decode rounds its inputs (`lanes.py`).

An element is summed over 128 columns at a time, and the sums one after another: the same bits for any tokens beside it,
any threads and any part of a prompt.

Threads: workers meet once the tokens are in form; then each takes units of 128 rows until none is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from cpu_kernels import barrier
from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import BLOCK, GROUP
from cpu_kernels.lanes import I64, LANES, Code, new_inputs, one_input, round_input
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_sum import column_bytes
from cpu_kernels.row_type import Panel
from cpu_kernels.row_types import has_tail, in_blocks, type_like, weight_of
from cpu_kernels.tiles import (
    TOKENS,
    code_tile,
    code_tile_2,
    code_tile_4,
    float_tile,
    float_tile_2,
    float_tile_4,
    panel_columns,
)
from cpu_kernels.widen import widen_columns
from cpu_kernels.worker_pool import Each, WorkerPool

UNIT = 128  # rows, or columns of a sum of rows, of one piece of work
_SPACING = GROUP + LANES  # f32 from one widened row to the next: rows a power of two apart share lines of the cache


class Tokens(NamedTuple):
    """Tokens as tiles read them, 6 side by side, 128 columns of all of them after the other: f32
    [P / 128, groups, 128, 6]; or codes int16 [P / 128, groups, 64, 6, 2] with scales f32 [P / 128, groups, 4, 6]. As
    addresses need no shapes, each is a vector."""

    floats: np.ndarray
    codes: np.ndarray
    scales: np.ndarray


class Own(NamedTuple):
    """A worker's own: panels of a unit with their scales, rows widened for a sum, an input's forms, and
    f32 [2, tokens, 128] results of a unit."""

    panels: np.ndarray
    scales: np.ndarray
    wide: np.ndarray
    input: Any
    results: np.ndarray


def groups_of(tokens: int) -> int:
    """Groups of 6 tokens."""
    return -(-tokens // TOKENS)


def new_tokens(tokens: int, columns: int) -> Tokens:
    """Room for so many tokens of up to `columns` columns, in either form."""
    n, width = groups_of(tokens) * TOKENS, padded(columns)
    return Tokens(aligned(n * width, np.float32), aligned(n * width, np.int16), aligned(n * width // BLOCK, np.float32))


def new_own(tokens: int, columns: int) -> Own:
    """One worker's buffers for so many tokens of inputs of up to `columns` columns."""
    rows = groups_of(tokens) * TOKENS  # a tile of an odd number of tokens adds one more
    return Own(
        panels=aligned(UNIT * GROUP, np.float32),
        scales=aligned(UNIT * GROUP // BLOCK, np.float32),
        wide=aligned(GROUP * _SPACING, np.float32).reshape(GROUP, _SPACING),
        input=new_inputs(1, columns),
        results=aligned(2 * rows * UNIT, np.float32).reshape(2, rows, UNIT),
    )


def aligned(count: int, dtype: Any) -> np.ndarray:
    """Zeros that begin at a line of the cache."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    skipped = -raw.ctypes.data % 64
    return raw[skipped : len(raw) - 64 + skipped].view(dtype)


@subroutine
def pack_group(x, g, floats):  # type: ignore[no-untyped-def]
    """Tokens 6 g to 6 g + 5 of x [t, d], or as many as there are, into their place of `Tokens.floats`."""
    tokens, d = x.shape
    groups = (tokens + TOKENS - 1) // TOKENS
    for first in range(0, d, GROUP):
        base = (first * groups + g * GROUP) * TOKENS
        for t in range(min(TOKENS, tokens - TOKENS * g)):
            for k in range(min(GROUP, d - first)):
                floats[base + k * TOKENS + t] = x[TOKENS * g + t, first + k]


@subroutine
def pack_codes(x, g, own, codes, scales):  # type: ignore[no-untyped-def]
    """`pack_group` for rows in blocks: each token's input rounded to 16 bits, a block of 32 at a time."""
    tokens, d = x.shape
    groups, form = (tokens + TOKENS - 1) // TOKENS, one_input(own.input, 0)
    for t in range(min(TOKENS, tokens - TOKENS * g)):
        for k in range(d):
            form[0][k] = x[TOKENS * g + t, k]
        round_input(form, d)
        for first in range(0, padded(d), GROUP):
            base = (first * groups + g * GROUP) * TOKENS + 2 * t
            for k in range(0, GROUP, 2):
                codes[base + k * TOKENS] = form[1][first + k]
                codes[base + k * TOKENS + 1] = form[1][first + k + 1]
            base = (first * groups + g * GROUP) // BLOCK * TOKENS + t
            for b in range(GROUP // BLOCK):
                scales[base + b * TOKENS] = form[2][first // BLOCK + b]


@subroutine
def pack_tokens(state, like, x, own, packed):  # type: ignore[no-untyped-def]
    """Bring the tokens x [t, d] into the form that rows like `like` want; workers share the groups."""
    g = barrier.take(state)
    while g * TOKENS < x.shape[0]:
        if in_blocks(like):
            pack_codes(x, g, own, packed.codes, packed.scales)
        else:
            pack_group(x, g, packed.floats)
        g = barrier.take(state)


@intrinsic
def _panel_vectors(
    typing_context: Any, like: Any, row: Any, row_bytes: Any, count: Any, first: Any, last: Any, end: Any,
    weights: Any, scales: Any, width: Any,
) -> Any:  # fmt: skip
    """`RowType.panel` of 16 rows from the address `row` on; of fewer, `count`, the last again."""
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (_, row, row_bytes, count, first, last, end, weights, scales, width) = Code(context, builder), args
        last_row = builder.sub(count, I64(1))
        rows = []
        for number in range(LANES):
            some = builder.select(builder.icmp_signed("<", I64(number), count), I64(number), last_row)
            rows.append(builder.add(row, builder.mul(some, row_bytes)))
        kind.panel(code, rows, (first, last), end, Panel(weights, scales, width))
        # The next columns of these rows, while the tokens pass by.
        size = GROUP * kind.bits // 8
        ahead = builder.add(builder.mul(builder.lshr(first, I64(7)), I64(size)), I64(size))
        code.fetch_lines(rows, ahead, size)
        return context.get_dummy_value()

    return types.void(like, *(types.int64,) * 9), generate


@subroutine
def pack_panels(like, row, row_bytes, count, first, last, end, own):  # type: ignore[no-untyped-def]
    """Columns [first, last), at most 128, of `count` rows from the address `row` on, into the worker's panels."""
    columns = panel_columns()
    panels, scales = own.panels.ctypes.data, own.scales.ctypes.data
    for r in range(0, count, LANES):
        panel, at = r // columns, 4 * (r % columns)
        weights = panels + panel * GROUP * columns * 4 + at
        of = scales + panel * (GROUP // BLOCK) * columns * 4 + at
        some = min(LANES, count - r)
        here = row + r * row_bytes
        _panel_vectors(like, here, row_bytes, some, first, last, end, weights, of, columns * 4)
        if has_tail(like):
            for j in range(first + ((last - first) & -LANES), last):
                place = (panel * GROUP + j - first) * columns + r % columns
                for i in range(LANES):
                    own.panels[place + i] = weight_of(like, here + min(i, some - 1) * row_bytes, j)


@subroutine(forceinline=True)
def float_tile_of(tokens, panel, width, x, k, out, stride):  # type: ignore[no-untyped-def]
    """A float tile of 1 to 6 tokens; of an odd number the sums of one more are added."""
    if tokens > 4:
        float_tile(panel, width, x, k, out, stride)
    elif tokens > 2:
        float_tile_4(panel, width, x, k, out, stride)
    else:
        float_tile_2(panel, width, x, k, out, stride)


@subroutine(forceinline=True)
def code_tile_of(tokens, panel, width, scales, x, x_scales, blocks, out, stride):  # type: ignore[no-untyped-def]
    """A code tile of 1 to 6 tokens."""
    if tokens > 4:
        code_tile(panel, width, scales, x, x_scales, blocks, out, stride)
    elif tokens > 2:
        code_tile_4(panel, width, scales, x, x_scales, blocks, out, stride)
    else:
        code_tile_2(panel, width, scales, x, x_scales, blocks, out, stride)


@subroutine(forceinline=True)
def _tile(like, tokens, panel, own, x, place, k, out, stride):  # type: ignore[no-untyped-def]
    """One tile: a panel of the worker's times `k` columns of the inputs from number `place` on, added to `out`."""
    columns = panel_columns()
    weights = own.panels.ctypes.data + panel * GROUP * columns * 4
    if in_blocks(like):
        scales = own.scales.ctypes.data + panel * (GROUP // BLOCK) * columns * 4
        codes, of = x.codes.ctypes.data + place * 2, x.scales.ctypes.data + place // BLOCK * 4
        code_tile_of(tokens, weights, columns * 4, scales, codes, of, GROUP // BLOCK, out, stride)
    else:
        float_tile_of(tokens, weights, columns * 4, x.floats.ctypes.data + place * 4, k, out, stride)


@subroutine
def products(like, weight, row_bytes, row, count, d, x, tokens, own, which):  # type: ignore[no-untyped-def]
    """own.results[which, t, : count] = rows [row, row + count), at most 128, of the matrix at address `weight`, times
    token t's input; x: `Tokens` of d columns."""
    columns, end, groups = panel_columns(), column_bytes(like, padded(d)), (tokens + TOKENS - 1) // TOKENS
    results, stride = own.results[which].ctypes.data, own.results.strides[1]
    own.results[which, :tokens] = 0
    for first in range(0, d, GROUP):
        last = min(first + GROUP, d)
        pack_panels(like, weight + row * row_bytes, row_bytes, count, first, last, end, own)
        for panel in range((count + columns - 1) // columns):
            to = results + panel * columns * 4
            for g in range(groups):
                place = (first * groups + g * GROUP) * TOKENS
                _tile(like, tokens - TOKENS * g, panel, own, x, place, last - first, to, stride)
                to += TOKENS * stride


@subroutine
def row_sums(like, weight, row_bytes, rows, d, first, count, x, tokens, own, which):  # type: ignore[no-untyped-def]
    """own.results[which, t, : count] = the sum over rows of token t's input times these columns of the row, at most
    128 from a multiple of 128 on; x: `Tokens` of `rows` columns, floats."""
    columns, end, groups = panel_columns(), column_bytes(like, padded(d)), (tokens + TOKENS - 1) // TOKENS
    results, stride = own.results[which].ctypes.data, own.results.strides[1]
    own.results[which, :tokens] = 0
    for start in range(0, rows, GROUP):
        k = min(GROUP, rows - start)
        for j in range(k):
            widen_columns(like, weight + (start + j) * row_bytes, first, first + count, end, own.wide[j])
        for panel in range((count + columns - 1) // columns):
            weights, to = own.wide.ctypes.data + panel * columns * 4, results + panel * columns * 4
            for g in range(groups):
                inputs = x.floats.ctypes.data + (start * groups + g * GROUP) * TOKENS * 4
                float_tile_of(tokens - TOKENS * g, weights, own.wide.strides[0], inputs, k, to, stride)
                to += TOKENS * stride


@kernel
def _gemm(worker, workers, state, like, weight, row_bytes, x, bias, packed, own, out):  # type: ignore[no-untyped-def]
    pack_tokens(state, like, x, own, packed)
    if not barrier.wait(state, workers):
        return
    rows = out.shape[1]
    row = barrier.take(state) * UNIT
    while row < rows:
        count = min(UNIT, rows - row)
        products(like, weight, row_bytes, row, count, x.shape[1], packed, x.shape[0], own, 0)
        for t in range(x.shape[0]):
            for j in range(count):
                out[t, row + j] = own.results[0, t, j] + (bias[row + j] if bias.shape[0] else np.float32(0))
        row = barrier.take(state) * UNIT


class GemmScratch:
    """Buffers for products of many tokens, which grow as they are asked for; for one call at a time."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._packed: dict[str, tuple[int, int, Tokens]] = {}
        self._owns: tuple[int, int, Each] = (0, 0, Each())

    def packed(self, name: str, tokens: int, columns: int) -> Tokens:
        """The buffer `name` for so many tokens."""
        most, widest, found = self._packed.get(name, (0, 0, Tokens(*[np.empty(0, np.float32)] * 3)))
        if tokens > most or columns > widest:
            most, widest = max(tokens, most), max(columns, widest)
            found = new_tokens(most, widest)
            self._packed[name] = (most, widest, found)
        return found

    def owns(self, tokens: int, columns: int) -> Each:
        """Each worker's own buffers."""
        most, widest, found = self._owns
        if tokens > most or columns > widest:
            most, widest = max(tokens, most), max(columns, widest)
            found = Each(new_own(most, widest) for _ in range(self._threads))
            self._owns = (most, widest, found)
        return found


def gemm(
    matrix: Matrix, x: np.ndarray, bias: np.ndarray, out: np.ndarray, pool: WorkerPool, scratch: GemmScratch
) -> None:
    """out[t, i] = sum_j weight[i, j] * x[t, j] + bias[i], for any number of tokens; weights are read once.

    matrix: [n, d]; x: [t, d] f32; bias: [n] f32, or of length 0 for none; out: [t, n] f32, all C-contiguous.
    Raises `ValueError` when shapes or types do not fit.
    """
    n, d = matrix.shape
    if x.shape != (len(x), d) or out.shape != (len(x), n) or bias.shape not in ((n,), (0,)):
        raise ValueError(f"gemm shapes do not fit: weight {matrix.shape}, x {x.shape}, bias {bias.shape}, {out.shape}")
    if {x.dtype, out.dtype, bias.dtype} != {np.dtype(np.float32)} or not (
        x.flags.c_contiguous and out.flags.c_contiguous
    ):
        raise ValueError(f"gemm wants contiguous f32 x, bias and out, got {x.dtype}, {bias.dtype}, {out.dtype}")
    if not len(x):
        return
    weights = matrix.like, matrix.rows.ctypes.data, matrix.row_bytes
    buffers = scratch.packed("x", *x.shape), scratch.owns(*x.shape)
    pool.run(_gemm, pool.threads, pool.barrier, *weights, x, bias, *buffers, out)


def gemm_ref(matrix: Matrix, x: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """`gemm` in NumPy, accumulated in f64."""
    out[:] = x.astype(np.float64) @ matrix.widen().numpy().astype(np.float64).T
    if bias.size:
        out += bias
