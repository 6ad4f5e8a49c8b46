"""GEMM: y[t] = W x[t] of many tokens, as prompts have them, by tiles (`tiles.py`) of 6 tokens.

Weights are read as they are stored, once for all tokens: 128 rows by 128 columns become panels (`panels.py`) in the
worker's own cache, and all tokens are multiplied with them. Tokens are brought into the tiles' form once.

An element is summed over 128 columns at a time, and the sums one after another: the same bits for any tokens beside it,
any threads and any part of a prompt.

Threads: workers meet once the tokens are in form; then each takes units of up to 128 rows until none is left, of few
rows smaller ones, or parts of the tokens of a unit (`shares_of`).
"""

from __future__ import annotations

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import BLOCK, GROUP, Precision
from cpu_kernels.matrix import Matrix
from cpu_kernels.panels import (
    UNIT,
    Tokens,
    form_of,
    in_codes,
    new_own,
    new_tokens,
    pack_rows,
    pack_sums,
    pack_tokens,
)
from cpu_kernels.row_sum import column_bytes
from cpu_kernels.terms import add_term_tiles, begin_tiles, end_tiles, in_terms
from cpu_kernels.tile_unit import ROWS
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
from cpu_kernels.widen import fetch_columns
from cpu_kernels.worker_pool import Each, WorkerPool

LEAST = BLOCK  # rows of a unit
# Tokens whose products with weights take as long as bringing these into panels, where 14 threads share the memory; two
# alone take as long as for 16.
PACKING = 64


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


@subroutine
def _add_tiles(form, panel, width, own, place, x, some, tokens, k, count, first, which):  # type: ignore[no-untyped-def]
    """own.results[which, t, :count] += the panels' columns times `k` columns of the inputs of `some` tokens from
    `first` on.

    panel: address of the first one, its lines `width` bytes apart, and the next one's first `place` bytes on.
    """
    columns, groups = panel_columns(), (tokens + TOKENS - 1) // TOKENS
    results, stride = own.results[which].ctypes.data, own.results.strides[1]
    scales, blocks = own.scales.ctypes.data, (k + BLOCK - 1) // BLOCK
    for number in range((count + columns - 1) // columns):
        weights, to = panel + number * place, results + number * columns * 4
        of = scales + number * (GROUP // BLOCK) * columns * 4
        to += some[0] * stride
        for g in range(some[0] // TOKENS, (some[1] + TOKENS - 1) // TOKENS):
            at = (first * groups + g * GROUP) * TOKENS
            if in_codes(form):
                pairs, x_scales = x.pairs.ctypes.data + at * 2, x.scales.ctypes.data + at // BLOCK * 4
                code_tile_of(tokens - TOKENS * g, weights, width, of, pairs, x_scales, blocks, to, stride)
            else:
                float_tile_of(tokens - TOKENS * g, weights, width, x.floats.ctypes.data + at * 4, k, to, stride)
            to += TOKENS * stride


@subroutine
def products(form, like, weight, row_bytes, row, count, d, x, some, tokens, own, which):  # type: ignore[no-untyped-def]
    """own.results[which, t, : count] = rows [row, row + count), at most 128, of the matrix at address `weight`, times
    token t's input, for `some` of the tokens, from first to last; x: `Tokens` of d columns."""
    columns, end = panel_columns(), column_bytes(like, padded(d))
    own.results[which, some[0] : some[1]] = 0
    begin_tiles(form)
    for first in range(0, d, GROUP):
        last = min(first + GROUP, d)
        pack_rows(form, like, weight + row * row_bytes, row_bytes, count, first, last, end, own)
        if in_terms(form):
            ahead, coming = weight + row * row_bytes + column_bytes(like, last), count if last < d else 0
            add_term_tiles(
                form, like, own, x, some, tokens, last - first, count, first, which, ahead, row_bytes, coming, GROUP
            )  # fmt: skip
            continue
        fetch_columns(like, weight + row * row_bytes, row_bytes, count, last, min(GROUP, d - last))
        panels, place = own.panels.ctypes.data, GROUP * columns * 4
        _add_tiles(form, panels, columns * 4, own, place, x, some, tokens, last - first, count, first, which)
    end_tiles(form)


@subroutine
def row_sums(  # type: ignore[no-untyped-def]
    form, like, weight, row_bytes, rows, d, first, count, x, some, tokens, own, which
):  # fmt: skip
    """own.results[which, t, : count] = the sum over rows of token t's input times these columns of the row, at most
    128 from a multiple of 32 on, of rows in blocks of 128, for `some` of the tokens; x: `Tokens` of `rows` columns."""
    columns, end = panel_columns(), column_bytes(like, padded(d))
    own.results[which, some[0] : some[1]] = 0
    begin_tiles(form)
    for start in range(0, rows, GROUP):
        k = min(GROUP, rows - start)
        pack_sums(form, like, weight + start * row_bytes, row_bytes, k, first, first + count, end, own)
        if in_terms(form):
            ahead = weight + (start + GROUP) * row_bytes + column_bytes(like, first)
            coming = min(GROUP, rows - start - GROUP)
            add_term_tiles(form, like, own, x, some, tokens, k, count, start, which, ahead, row_bytes, coming, count)
            continue
        following = min(GROUP, rows - start - k)
        fetch_columns(like, weight + (start + k) * row_bytes, row_bytes, following, first, count)
        if in_codes(form):
            panels, width, place = own.panels.ctypes.data, columns * 4, GROUP * columns * 4
        else:
            panels, width, place = own.wide.ctypes.data, own.wide.strides[0], columns * 4
        _add_tiles(form, panels, width, own, place, x, some, tokens, k, count, start, which)
    end_tiles(form)


@subroutine
def tile_tokens(form):  # type: ignore[no-untyped-def]
    """Tokens of a tile."""
    return ROWS if in_terms(form) else TOKENS


@kernel
def shares_of(count, tokens, of_tile, workers, least):  # type: ignore[no-untyped-def]
    """How `count` rows and the tokens, `of_tile` a tile, are shared out so that workers end soonest: rows of a unit,
    128 or a half or a quarter of it and no less than `least`, and in how many parts of the tokens each unit is taken.

    A part packs its unit's weights again and a tile takes whole panels: both are counted, as is who waits for others.
    """
    columns, groups = panel_columns(), (tokens + of_tile - 1) // of_tile
    best, found = np.inf, (UNIT, 1)
    rows = UNIT
    while rows >= least:
        units, wide = (count + rows - 1) // rows, (rows + columns - 1) // columns * columns
        for parts in range(1, min(groups, workers) + 1):
            rounds = (units * parts + workers - 1) // workers
            passing = (groups + parts - 1) // parts * of_tile
            cost = float(rounds * (wide * passing + rows * PACKING))
            if cost < best:
                best, found = cost, (rows, parts)
        rows //= 2
    return found


@subroutine
def some_tokens(form, part, parts, tokens):  # type: ignore[no-untyped-def]
    """The tokens of a part, whole tiles: [first, last)."""
    size = tile_tokens(form)
    groups = (tokens + size - 1) // size
    return groups * part // parts * size, min(groups * (part + 1) // parts * size, tokens)


@kernel
def _gemm(worker, workers, state, form, like, weight, row_bytes, x, bias, packed, own, out):  # type: ignore[no-untyped-def]
    pack_tokens(state, form, like, x, own, packed)
    if not barrier.wait(state, workers):
        return
    rows, tokens = out.shape[1], x.shape[0]
    unit, parts = shares_of(rows, tokens, tile_tokens(form), workers, LEAST)
    piece = barrier.take(state)
    while piece // parts * unit < rows:
        row, some = piece // parts * unit, some_tokens(form, piece % parts, parts, tokens)
        count = min(unit, rows - row)
        products(form, like, weight, row_bytes, row, count, x.shape[1], packed, some, tokens, own, 0)
        for t in range(some[0], some[1]):
            for j in range(count):
                out[t, row + j] = own.results[0, t, j] + (bias[row + j] if bias.shape[0] else np.float32(0))
        piece = barrier.take(state)


class GemmScratch:
    """Buffers for products of many tokens, which grow as they are asked for; for one call at a time.

    precision: of the products.
    """

    def __init__(self, threads: int, precision: Precision = "precise") -> None:
        self.form = form_of(precision)
        self._threads = threads
        self._packed: dict[str, tuple[int, int, Tokens]] = {}
        self._owns: tuple[int, Each] = (0, Each())

    def packed(self, name: str, tokens: int, columns: int) -> Tokens:
        """The buffer `name` for so many tokens."""
        most, widest = (0, 0) if name not in self._packed else self._packed[name][:2]
        if name not in self._packed or tokens > most or columns > widest:
            most, widest = max(tokens, most), max(columns, widest)
            self._packed[name] = most, widest, new_tokens(most, widest, self.form)
        return self._packed[name][2]

    def owns(self, tokens: int) -> Each:
        """Each worker's own buffers."""
        most, found = self._owns
        if tokens > most:
            found = Each(new_own(tokens, self.form) for _ in range(self._threads))
            self._owns = (tokens, found)
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
    buffers = scratch.packed("x", *x.shape), scratch.owns(len(x))
    pool.run(_gemm, pool.threads, pool.barrier, scratch.form, *weights, x, bias, *buffers, out)


def gemm_ref(matrix: Matrix, x: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """`gemm` in NumPy, accumulated in f64."""
    out[:] = x.astype(np.float64) @ matrix.widen().numpy().astype(np.float64).T
    if bias.size:
        out += bias
