"""Attention of a prompt's tokens over the KV cache where it lies, on tensor cores, in one kernel (arXiv 2205.14135).

    out[t, h] = sum over i of  p[i] * V[i],     p = softmax over i of  q[t, h] . K[i] / sqrt(head_dim)

for the positions i in [max(0, position + 1 - window), position] of the token's, with the keys K and values V of KV head
h // (n_heads // n_kv_heads).

A program has `rows` queries, token by token all heads of a group, so that a key is read once for them, and goes through
their keys, a tile at a time, with an online softmax. Most tiles are seen whole by all of its queries: these need no
mask. Programs with the most keys start first, then those with the fewest: a multiprocessor that takes two of one
prompt's first tokens has one of each.

Both products are of 16-bit values, which are exact in f32. Keys and values are such as they lie in the cache; what they
meet, q and p, is split in terms whose sum it is: 2 of f16 keep 22 bits, 3 of f16 or bf16 all of f32's. Powers of two
keep f16 in its range: one brings a row's largest |q| near 2^15 (see `row_gemm`), and p ends at 2^15 instead of 1. Codes
of int8 are exact in both types: keys meet q in f16; values meet p times their scales, of any size, in bf16, of which 2
terms keep 16 bits. What meets an f32 cache is not split here: its products are three of TF32's each, 22 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_kernels.attention import LOG2_E, check_attention
from gpu_kernels.launch import is_native
from gpu_kernels.rope import check_scales
from gpu_kernels.row_gemm import powers

LEAST = tl.constexpr(-3.0e38)  # below every score but that of what is not seen, whose p is then 0, not NaN
P_SCALE = tl.constexpr(2.0**15)
# Of each type of the cache, those in which keys and values are multiplied.
_TYPES = {
    torch.float16: (tl.float16, tl.float16),
    torch.bfloat16: (tl.bfloat16, tl.bfloat16),
    torch.int8: (tl.float16, tl.bfloat16),
    torch.float32: (tl.float32, tl.float32),
}


class Tile(NamedTuple):
    """Queries of a program, keys at a time, its warps, and tiles of keys under way."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(head_dim: int, dtype: torch.dtype, terms: int) -> Tile:
    """What fits the registers of an H100 or H200, and its shared memory twice, for a type of the cache; and once the
    100 KB of smaller GPUs."""
    if dtype == torch.float32:
        return Tile(64, 16, 4, 2) if head_dim <= 128 else Tile(16, 16, 8, 2)
    return Tile(64, 64 if terms == 2 else 32, 4, 3) if head_dim <= 128 else Tile(32, 32, 8, 2)


@triton.jit
def _dot(x, y, sums, TYPE: tl.constexpr, TERMS: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums + x times y, with x f32 in TERMS terms of TYPE, the smallest first; y, of any type, is exact in that.

    Triton's interpreter (not `NATIVE`) multiplies the bits of bf16: there all are widened.
    """
    y = y.to(TYPE if NATIVE else tl.float32)
    if TYPE.is_fp32():
        return tl.dot(x, y, sums, input_precision="tf32x3")
    first = x.to(TYPE)
    rest = x - first.to(tl.float32)
    second = rest.to(TYPE)
    if TERMS == 3:
        third = (rest - second.to(tl.float32)).to(TYPE)
        sums = tl.dot(third if NATIVE else third.to(tl.float32), y, sums)
    sums = tl.dot(second if NATIVE else second.to(tl.float32), y, sums)
    return tl.dot(first if NATIVE else first.to(tl.float32), y, sums)


@triton.jit
def _rows_of(table, at, end, kv_head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of the cache with the keys of KEYS positions from `at` on, a multiple of KEYS, which lies before `end`."""
    place = tl.arange(0, KEYS)
    if BLOCK_SIZE % KEYS == 0:  # all in one block
        block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        return (block * (2 * KV_HEADS) + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE + place
    block = tl.load(table + (at + place) // BLOCK_SIZE, mask=at + place < end, other=0).to(tl.int64)
    return (block * (2 * KV_HEADS) + kv_head) * BLOCK_SIZE + (at + place) % BLOCK_SIZE


@triton.jit
def _through(  # type: ignore[no-untyped-def]
    out, largest, total, query, scale, position, cache, scales, table, kv_head, low, high, end, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, TERMS: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """The sums, largest scores and sums of p of all rows after the keys [low, high) too, low a multiple of KEYS.

    Not MASKED: every row sees all of them. Of three terms a tile's sum begins at 0 and is added in f32, as tensor cores
    cut off what they add to a long sum.
    """
    PADDED: tl.constexpr = query.shape[1]
    VALUES: tl.constexpr = KV_HEADS * BLOCK_SIZE  # rows from a key to its value
    column = tl.arange(0, PADDED)[None, :]
    for first in tl.range(low, high, KEYS):
        at = first + tl.arange(0, KEYS)
        row = _rows_of(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, KEYS)
        here = cache + row[:, None] * HEAD_DIM + column
        if MASKED:
            mask = (at < end)[:, None] & (column < HEAD_DIM)
            key = tl.load(here, mask=mask, other=0)
            value = tl.load(here + VALUES * HEAD_DIM, mask=mask, other=0)
        elif PADDED == HEAD_DIM:
            key, value = tl.load(here), tl.load(here + VALUES * HEAD_DIM)
        else:
            key = tl.load(here, mask=column < HEAD_DIM, other=0)
            value = tl.load(here + VALUES * HEAD_DIM, mask=column < HEAD_DIM, other=0)
        score = tl.zeros([query.shape[0], KEYS], tl.float32)
        score = _dot(query, tl.trans(key), score, KEY, TERMS, NATIVE)
        if SCALED:
            score *= tl.load(scales + row, mask=at < end, other=0.0)[None, :]
        if MASKED:
            ahead = position[:, None] - at[None, :]
            seen = ahead >= 0
            if WINDOWED:
                seen &= ahead < window
            score = tl.where(seen, score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1) * scale)
        p = tl.exp2(tl.fma(score, scale[:, None], -larger[:, None]))
        if VALUE.is_fp16():
            p *= P_SCALE
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(scales + row + VALUES, mask=at < end, other=0.0)[None, :]
        if TERMS == 3:
            found = _dot(p, value, tl.zeros_like(out), VALUE, TERMS, NATIVE)
            out = tl.fma(out, shrink[:, None], found)  # a plain sum would be given to the tensor cores
        else:
            out = _dot(p, value, out * shrink[:, None], VALUE, TERMS, NATIVE)
        largest = larger
    return out, largest, total


@triton.jit(do_not_specialize=["tokens", "window"])
def _prompt_kernel(  # type: ignore[no-untyped-def]
    q, q_stride, cache, scales, table, positions, tokens, window, out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    TERMS: tl.constexpr, SCALED: tl.constexpr, WINDOWED: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """ROWS queries of one KV head; axis 0 of the grid is the KV heads, axis 1 the tiles."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, turn, half = tl.program_id(0), tl.program_id(1), (tl.num_programs(1) + 1) // 2
    tile = turn - half
    if turn < half:
        tile = tl.num_programs(1) - 1 - turn
    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)[None, :]
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    mask = (token < tokens)[:, None] & (column < HEAD_DIM)
    query = tl.load(q + (token.to(tl.int64) * q_stride + head * HEAD_DIM)[:, None] + column, mask=mask, other=0.0)
    query = query * (LOG2_E / tl.sqrt(HEAD_DIM * 1.0))
    down, scale = powers(tl.max(tl.abs(query), 1))
    query *= down[:, None]

    start, last = tl.load(positions), tl.load(positions + tokens - 1)
    start, last = tl.maximum(start, ~start), tl.maximum(last, ~last)
    position = tl.minimum(start + token, last)  # without a load for each row
    low_query = tl.minimum(start + tile * ROWS // GROUP, last)
    end = tl.minimum(start + ((tile + 1) * ROWS - 1) // GROUP, last) + 1
    whole = (low_query + 1) // KEYS * KEYS  # keys from here on are not seen by all
    result = tl.zeros([ROWS, PADDED], tl.float32)
    largest, total = tl.full([ROWS], LEAST, tl.float32), tl.zeros([ROWS], tl.float32)
    since = 0
    if WINDOWED:
        low = tl.maximum(low_query + 1 - window, 0) // KEYS * KEYS
        since = tl.minimum((tl.maximum(end - window, 0) + KEYS - 1) // KEYS * KEYS, whole)
        result, largest, total = _through(
            result, largest, total, query, scale, position, cache, scales, table, kv_head, low, since, end, window,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, KEY, VALUE, TERMS, SCALED, True, True, NATIVE
        )  # fmt: skip
    result, largest, total = _through(
        result, largest, total, query, scale, position, cache, scales, table, kv_head, since, whole, end, window,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, KEY, VALUE, TERMS, SCALED, False, WINDOWED, NATIVE
    )  # fmt: skip
    result, largest, total = _through(
        result, largest, total, query, scale, position, cache, scales, table, kv_head, whole, end, end, window,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, KEY, VALUE, TERMS, SCALED, True, WINDOWED, NATIVE
    )  # fmt: skip
    place = out + (token.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + column
    tl.store(place, result / total[:, None], mask=mask)


def prompt_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    terms: int = 2,
    tile: Tile | None = None,
) -> None:
    """Attention of each token's query over its own position and those before it, at most `window` in all.

    q: [t, n_heads, head_dim] f32, which may be a view inside qkv: heads contiguous, the token's stride free. cache:
    [blocks, 2, n_kv_heads, block_size, head_dim] f32, f16 or bf16, or int8 with `scales` f32 [blocks, 2, n_kv_heads,
    block_size], keys at 0 and values at 1, which hold all positions up to the last token's. table: [n] int32 ids of the
    sequence's blocks in order. positions: [t] int32, one after another, of which the last may be repeated; ~p is p, as
    for `rope`; each within `table` (not checked: it is device memory). out: [t, n_heads * head_dim] f32. terms: 2 or 3,
    in which q and p are split. tile: by default that of `tile_for`. Raises `ValueError` when shapes, types, strides,
    terms or the window do not fit.
    """
    check_scales("prompt_attention", cache, scales)
    check_attention("prompt_attention", q, cache, window, out)
    _check(q, table, positions, terms)
    tile = tile or tile_for(q.shape[2], cache.dtype, terms)
    (tokens, heads, head_dim), (kv_heads, block_size) = q.shape, cache.shape[2:4]
    key, value = _TYPES[cache.dtype]
    tiles = triton.cdiv(tokens * (heads // kv_heads), tile.rows)
    _prompt_kernel[(kv_heads, tiles)](
        q, q.stride(0), cache, scales, table, positions, tokens, 0 if window is None else window, out,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        ROWS=tile.rows, KEYS=tile.keys, PADDED=max(16, triton.next_power_of_2(head_dim)), KEY=key, VALUE=value,
        TERMS=terms, SCALED=scales is not None, WINDOWED=window is not None, NATIVE=is_native(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def prompt_attention_ref(
    q: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    terms: int = 2,
) -> None:
    """`prompt_attention` in torch, in f64, with a plain softmax over all scores."""
    tokens, head_dim = q.shape[0], q.shape[2]
    kv_heads, block_size = cache.shape[2:4]
    own = torch.maximum(positions, ~positions)
    end = int(own.max()) + 1
    ids = table[: -(-end // block_size)].long()
    blocks = cache[ids].double()
    blocks = blocks if scales is None else blocks * scales[ids][..., None]
    keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end]
    ahead = own[:, None] - torch.arange(end, device=q.device)
    seen = (ahead >= 0) & (ahead < (end if window is None else window))
    grouped = q.double().view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ keys[:, None].mT / math.sqrt(head_dim)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out.copy_((p @ values[:, None]).permute(2, 0, 1, 3).reshape(tokens, -1))


def _check(q: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, terms: int) -> None:
    if table.ndim != 1 or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(f"prompt_attention wants a contiguous int32 table [n], got {table.dtype} {tuple(table.shape)}")
    if positions.shape != (q.shape[0],) or positions.dtype != torch.int32 or not positions.is_contiguous():
        raise ValueError(
            f"prompt_attention wants contiguous int32 positions [{q.shape[0]}], got {positions.dtype} "
            f"{tuple(positions.shape)}"
        )
    if not len(q) or terms not in (2, 3):
        raise ValueError(f"prompt_attention wants at least one token and 2 or 3 terms, got {len(q)}, {terms}")
