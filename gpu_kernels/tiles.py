"""Tiles of weights of every kind: dot products of rows with a few tokens, and sums of scaled rows.

A thread loads 16 bytes of a row, a *group* of `VECTOR` weights, so that sums over a group stay within the thread and
meet other threads' once per row. The values of x that belong to a group are loaded four at a time and joined, for the
same reason: in the layout that f32 loads get by themselves, x would pass through shared memory and a barrier in every
step. The scales of blocks are loaded once per group, as a flat list in the order of the threads.

Columns are known when a kernel is compiled: the alignment of rows, and so the width of loads, follows from them. A
group of int4 is four 32-bit words of eight codes: columns f .. f + 7 of each of the four blocks of 128 columns. A code
stays at its place in the word and becomes the mantissa of 2^23 + 16^s code, from which 2^23 + 8 * 16^s is taken: three
instructions for each weight with its multiplication, exact, and the scale of the block is made 16^s times smaller.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cpu_kernels.contract import MAX_BATCH
from gpu_kernels.constants import BLOCK_WEIGHTS, GROUP_WEIGHTS, INT4_OFFSET, SCALE_BYTES

# Weights of a group. "codes" are int8 without scales, as predictors have them: rows of bytes, padded to whole 128.
VECTOR = {"f32": 4, "bf16": 8, "f16": 8, "int8": 16, "codes": 16, "int4": 32}
# Tokens whose sums a program holds in registers. Of 8 it would read four times as much of x as of the weights, which
# takes longer than two groups of 4.
TOGETHER = 4


def token_groups(name: str, tokens: int) -> tuple[int, int]:
    """Tokens of a group, whose sums a program holds together, and how many groups there are.

    Raises `ValueError` for a number of them that kernel `name` does not take.
    """
    together = min(tokens, TOGETHER)
    if not 1 <= tokens <= MAX_BATCH or tokens % together:
        raise ValueError(
            f"{name} takes 1 to {TOGETHER} tokens, or a multiple of {TOGETHER} up to {MAX_BATCH}, got {tokens}"
        )
    return together, tokens // together


@triton.jit
def program_in_group(T: tl.constexpr, groups):  # type: ignore[no-untyped-def]
    """Which of the programs of its group of T tokens this is, and the group's first token.

    Programs that read the same weights, for each of the `groups`, are neighbours: all but one find them in a cache.
    """
    return tl.program_id(0) // groups, tl.program_id(0) % groups * T


@triton.jit
def append(values, value):  # type: ignore[no-untyped-def]
    """A tuple with one more value: kernels keep a value per token in one."""
    return values + (value,)  # noqa: RUF005


@triton.jit
def zero_tiles(COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """`COUNT` tiles [A, B] of f32 zeros."""
    tiles = ()
    for _i in tl.static_range(COUNT):
        tiles = append(tiles, tl.zeros((A, B), tl.float32))
    return tiles


@triton.jit
def _load_four(x, first, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[first[g] + i] as [groups, 4], 0 from `columns` on."""
    at = first[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(x + at, mask=at < columns, other=0.0)


@triton.jit
def load_groups(x, first, columns: tl.constexpr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[first[g] + i] as [groups, V] f32, 0 from `columns` on; V is 4, 8 or 16."""
    if V == 4:
        values = _load_four(x, first, columns)
    elif V == 8:
        halves = tl.join(_load_four(x, first, columns), _load_four(x, first + 4, columns))
        values = tl.reshape(tl.permute(halves, (0, 2, 1)), (first.shape[0], 8))
    else:
        even = tl.join(_load_four(x, first, columns), _load_four(x, first + 8, columns))
        odd = tl.join(_load_four(x, first + 4, columns), _load_four(x, first + 12, columns))
        values = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (first.shape[0], 16))
    return values


@triton.jit
def load_scales(scales, block, mask, R: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale block[g] of each row as f32 [R, G]."""
    at = tl.reshape(scales[:, None] + block[None, :], (R * G,))
    found = tl.load(at, mask=tl.reshape(mask, (R * G,)), other=0.0)
    return tl.reshape(found.to(tl.float32), (R, G))


@triton.jit
def int4_columns(c, S: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """First columns of the codes at place S of G groups from column `c` on: eight neighbours each."""
    group = tl.arange(0, G)
    return c + group // 4 * GROUP_WEIGHTS + S * BLOCK_WEIGHTS + group % 4 * 8


@triton.jit
def int4_codes(words, S: tl.constexpr, R: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """16^S (code - 8) of the codes at place S of int32 words [R, 4 G], as f32 [R, G, 8]."""
    FACTOR: tl.constexpr = 1 << (4 * S)
    MASK: tl.constexpr = 15 * FACTOR
    # The bits of 2^23. Axis 2 of the grid is always 1; a number that the compiler cannot know takes one instruction
    # for `and` with `or` where two constants take two.
    exponent = 0x4B000000 + tl.program_id(2)
    low = ((words & MASK) | exponent).to(tl.float32, bitcast=True) - (8388608.0 + INT4_OFFSET * FACTOR)
    high = (((words >> 16) & MASK) | exponent).to(tl.float32, bitcast=True) - (8388608.0 + INT4_OFFSET * FACTOR)
    return tl.reshape(tl.join(low, high), (R, G, 8))


@triton.jit
def int8_codes(words, R: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """The int8 codes of int32 words [R, 4 G], as f32 [R, G, 16].

    Code + 128 becomes the mantissa of 2^23, or at its place in the upper byte of 16 bits 256 times as much; both are
    exact. A conversion would run at a quarter of the rate or less, and take longer than the bytes' way from memory.
    """
    exponent = 0x4B000000 + tl.program_id(2)  # as in `int4_codes`
    shifted = words ^ -0x7F7F7F80
    pairs = tl.join(shifted, shifted >> 16)
    even = ((pairs & 0xFF) | exponent).to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    odd = ((pairs & 0xFF00) | exponent).to(tl.float32, bitcast=True) * (1.0 / 256) - (32768.0 + 128.0)
    return tl.reshape(tl.join(even, odd), (R, G, 16))


@triton.jit
def load_step(  # type: ignore[no-untyped-def]
    w, ids, wanted, c, KIND: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Columns c .. c + C of rows ids[r] (int64 [R]) as they are stored, and the scales that belong to them; a tuple.

    c, C: multiples of 128, C a power of two. Nothing is read where not `wanted`, and no column beyond the row.
    """
    P: tl.constexpr = (K + GROUP_WEIGHTS - 1) // GROUP_WEIGHTS * GROUP_WEIGHTS
    if KIND == "int4":
        rows = w + ids * (P // 2 + P // BLOCK_WEIGHTS * SCALE_BYTES)
        at = c // 8 + tl.arange(0, C // 8)
        words = rows.to(tl.pointer_type(tl.int32))[:, None] + at[None, :]
        step = (tl.load(words, mask=wanted[:, None] & (at < P // 8)[None, :], other=0),)
        scales = (rows + P // 2).to(tl.pointer_type(tl.float16))
        for s in tl.static_range(4):
            first = int4_columns(c, s, C // 32)
            mask = wanted[:, None] & (first < P)[None, :]
            found = load_scales(scales, first // BLOCK_WEIGHTS, mask, R, C // 32)
            step = append(step, found * (1.0 / (1 << (4 * s))))
    elif KIND == "int8" or KIND == "codes":
        rows = w + ids * (P + P // BLOCK_WEIGHTS * SCALE_BYTES if KIND == "int8" else P)
        at = c // 4 + tl.arange(0, C // 4)
        words = rows.to(tl.pointer_type(tl.int32))[:, None] + at[None, :]
        step = (tl.load(words, mask=wanted[:, None] & (at < P // 4)[None, :], other=0),)
        if KIND == "int8":
            first = c + tl.arange(0, C // 16) * 16
            scales = (rows + P).to(tl.pointer_type(tl.float16))
            mask = wanted[:, None] & (first < P)[None, :]
            step = append(step, load_scales(scales, first // BLOCK_WEIGHTS, mask, R, C // 16))
    else:
        tl.static_assert(KIND == "f32" or KIND == "bf16" or KIND == "f16", "unknown kind of rows")
        at = c + tl.arange(0, C)
        rows = w + ids * K
        step = (tl.load(rows[:, None] + at[None, :], mask=wanted[:, None] & (at < K)[None, :], other=0.0),)
    return step


@triton.jit
def _dots(  # type: ignore[no-untyped-def]
    wide, scale, x, x_stride, first, K: tl.constexpr, T: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """scale * (wide [R, G, V] . x[t, first[g] + v]) as T tiles [R, G]; scale [R, G], or None for 1."""
    found = ()
    for t in tl.static_range(T):
        dots = tl.sum(wide * load_groups(x + t * x_stride, first, K, V)[None, :, :], 2)
        if scale is not None:
            dots = scale * dots
        found = append(found, dots)
    return found


@triton.jit
def _added(sums, more, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two tuples of T tiles, added tile by tile."""
    added = ()
    for t in tl.static_range(T):
        added = append(added, sums[t] + more[t])
    return added


@triton.jit
def _step_dots(  # type: ignore[no-untyped-def]
    step, x, x_stride, c, KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Products of what `load_step` found at column c with T tokens, as T tiles [R, groups]."""
    if KIND == "int4":
        dots = _dots(int4_codes(step[0], 0, R, C // 32), step[1], x, x_stride, int4_columns(c, 0, C // 32), K, T, 8)
        for s in tl.static_range(1, 4):
            wide, first = int4_codes(step[0], s, R, C // 32), int4_columns(c, s, C // 32)
            dots = _added(dots, _dots(wide, step[1 + s], x, x_stride, first, K, T, 8), T)
    elif KIND == "int8":
        dots = _dots(int8_codes(step[0], R, C // 16), step[1], x, x_stride, c + tl.arange(0, C // 16) * 16, K, T, 16)
    elif KIND == "codes":
        dots = _dots(int8_codes(step[0], R, C // 16), None, x, x_stride, c + tl.arange(0, C // 16) * 16, K, T, 16)
    elif KIND == "f32":
        wide = tl.reshape(step[0], (R, C // 4, 4))
        dots = _dots(wide, None, x, x_stride, c + tl.arange(0, C // 4) * 4, K, T, 4)
    else:
        tl.static_assert(KIND == "bf16" or KIND == "f16", "unknown kind of rows")
        wide = tl.reshape(step[0].to(tl.float32), (R, C // 8, 8))
        dots = _dots(wide, None, x, x_stride, c + tl.arange(0, C // 8) * 8, K, T, 8)
    return dots


@triton.jit
def row_dots(  # type: ignore[no-untyped-def]
    w, ids, wanted, x, x_stride,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, step=None
):  # fmt: skip
    """Rows ids[r] (int64 [R]) of the matrix at `w` times T tokens, as a tuple of T f32 [R]; 0 where not `wanted`.

    x: f32, row t at x + t * x_stride, K columns. C: columns of a step, a power of two of at least 128. step: what
    `load_step` found at column 0, for who has loaded it ahead.
    """
    P: tl.constexpr = (K + GROUP_WEIGHTS - 1) // GROUP_WEIGHTS * GROUP_WEIGHTS
    if step is None:
        step = load_step(w, ids, wanted, 0, KIND, K, R, C)
    sums = _step_dots(step, x, x_stride, 0, KIND, K, T, R, C)
    for c in range(C, P, C):
        step = load_step(w, ids, wanted, c, KIND, K, R, C)
        sums = _added(sums, _step_dots(step, x, x_stride, c, KIND, K, T, R, C), T)
    dots = ()
    for t in tl.static_range(T):
        dots = append(dots, tl.sum(sums[t], 1))
    return dots


@triton.jit
def _add_scaled(  # type: ignore[no-untyped-def]
    sums, wide, scale, factors, T: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr,
    A: tl.constexpr, W: tl.constexpr, G: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """sums[t * STEP + S] [W, G V] + the sum over a of factors[t][a W + w] * scale * wide [A W, G, V]; others stay."""
    following = ()
    for i in tl.static_range(T * STEP):
        if i % STEP == S:
            factor = factors[i // STEP][:, None]
            if scale is not None:
                factor = factor * scale
            terms = tl.reshape(wide * factor[:, :, None], (A, W, G * V))
            following = append(following, sums[i] + tl.sum(terms, 0))
        else:
            following = append(following, sums[i])
    return following


@triton.jit
def add_rows(  # type: ignore[no-untyped-def]
    sums, w, ids, wanted, factors, c,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, A: tl.constexpr, W: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Columns c .. c + C of rows ids[a W + w] (int64 [A W]) of the matrix at `w` times factors[t], added to sums.

    sums: a tuple of T tiles [W, C], or for int4 of 4 T tiles [W, C / 4], place by place; factors: T f32 [A W].
    c, C: multiples of 128, C a power of two. Rows not `wanted` are not read.
    """
    step = load_step(w, ids, wanted, c, KIND, K, A * W, C)
    if KIND == "int8":
        wide = int8_codes(step[0], A * W, C // 16)
        sums = _add_scaled(sums, wide, step[1], factors, T, 0, 1, A, W, C // 16, 16)
    elif KIND == "int4":
        for s in tl.static_range(4):
            wide = int4_codes(step[0], s, A * W, C // 32)
            sums = _add_scaled(sums, wide, step[1 + s], factors, T, s, 4, A, W, C // 32, 8)
    else:
        tl.static_assert(KIND == "f32" or KIND == "bf16" or KIND == "f16", "unknown kind of rows")
        wide = tl.reshape(step[0].to(tl.float32), (A * W, 1, C))
        sums = _add_scaled(sums, wide, None, factors, T, 0, 1, A, W, 1, C)
    return sums


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    out, sums, c, KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, out_stride, tokens
):  # fmt: skip
    """out[t * out_stride + c ..] = the sums of `add_rows` for t < `tokens`, added over w."""
    PLACES: tl.constexpr = 4 if KIND == "int4" else 1
    for i in tl.static_range(T * PLACES):
        if KIND == "int4":
            at = tl.reshape(int4_columns(c, i % 4, C // 32)[:, None] + tl.arange(0, 8)[None, :], (C // 4,))
        else:
            at = c + tl.arange(0, C)
        inside = at < tl.where(tokens > i // PLACES, K, 0)
        tl.store(out + i // PLACES * out_stride + at, tl.sum(sums[i], 0), mask=inside)
