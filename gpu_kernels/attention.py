"""Decode attention: one query per head over the keys and values of a block table, with grouped heads (GQA).

    out[t, h] = sum over i of  p[i] * V[i],     p = softmax over i of  q[t, h] . K[i] / sqrt(head_dim)

for the positions i in [max(0, position + 1 - window), position], with the keys K and values V of KV head
h // (n_heads // n_kv_heads).

The positions are cut into splits, each a program's, whose sums a second kernel joins (flash-decoding). How many splits
there are depends on heads and capacity alone, so that a token's sums are the same however many there are beside it;
where they begin is computed from the token's position, read on the device.
A program takes all heads of a group, at most 8, so that a key is read once. It goes through its positions KEYS at a
time, and each of the KEYS places keeps an online softmax of its own (arXiv 1805.02867): threads meet for the sum over
head_dim, and across keys only once, at the end. Meanwhile the next KEYS are under way. In int8 the codes are read as
they are: a score is multiplied with its key's scale, p with its value's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import MAX_BATCH
from gpu_kernels.launch import begin, options
from gpu_kernels.rope import CACHE_TYPES, check_places, check_scales

MOST_SPLITS = 128  # a program of the second kernel holds all splits of a head in registers
SPLIT_KEYS = 64  # least positions of a split at full context
PROGRAMS = 528  # four for each multiprocessor of an H100
MOST_GROUPED = 8
MOST_TOKENS = tl.constexpr(MAX_BATCH)
TILE = 8192  # most f32 sums of a program: 64 registers for each of 128 threads
KEY_BYTES = 64  # KEYS times the cache's item size, at most: more keys, and fewer programs fit a multiprocessor
LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True, eq=False)
class AttentionScratch:
    """What each split leaves: sums [t, n_heads, splits, head_dim], maxima and totals [t, n_heads, splits], all f32."""

    sums: torch.Tensor
    maxima: torch.Tensor
    totals: torch.Tensor

    @property
    def splits(self) -> int:
        return self.maxima.shape[2]


def attention_splits(kv_heads: int, capacity: int) -> int:
    """Splits that fill the GPU with programs of one token, of at least 64 positions each at `capacity`; 1 to 128."""
    wanted = min(PROGRAMS // kv_heads, capacity // SPLIT_KEYS, MOST_SPLITS)
    return max(1, wanted)


def attention_scratch(
    tokens: int, heads: int, head_dim: int, splits: int, device: torch.device | str
) -> AttentionScratch:
    """Scratch of `decode_attention`. Raises `ValueError` when `splits` is not from 1 to 128."""
    if not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"attention takes 1 to {MOST_SPLITS} splits, got {splits}")
    sums = torch.empty(tokens, heads, splits, head_dim, dtype=torch.float32, device=device)
    return AttentionScratch(sums, torch.empty_like(sums[..., 0]), torch.empty_like(sums[..., 0]))


@triton.jit
def _finite(maximum):  # type: ignore[no-untyped-def]
    """0 for the maximum of no keys, so that scores less it are -inf, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    cache,
    table,
    at,
    since,
    end,
    kv_head,
    column,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Keys and values of the positions `at` from `since` to before `end`, 0 elsewhere."""
    inside = (at >= since) & (at < end)
    block = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    row = (block * (2 * KV_HEADS) + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
    here = cache + row * HEAD_DIM + column
    mask = inside & (column < HEAD_DIM)
    key = tl.load(here, mask=mask, other=0)
    return key, tl.load(here + KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=mask, other=0)


@triton.jit
def _load_scales(scales, table, at, since, end, kv_head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of the rows that `_load_rows` gives."""
    inside = (at >= since) & (at < end)
    block = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    here = scales + (block * (2 * KV_HEADS) + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
    key = tl.load(here, mask=inside, other=0.0)
    return key, tl.load(here + KV_HEADS * BLOCK_SIZE, mask=inside, other=0.0)


@triton.jit
def _split_kernel(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    cache,
    scales,
    table,
    table_stride,
    positions,
    window,
    sums,
    maxima,
    totals,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPED: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Everything is [GROUPED heads, KEYS places, PADDED >= HEAD_DIM columns], or 1 where the same along an axis.

    The first KEYS are read before `begin`, but for those that this step wrote: none is before the least position.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    CHUNKS: tl.constexpr = (GROUP + GROUPED - 1) // GROUPED
    t, split = tl.program_id(2), tl.program_id(0)
    kv_head, chunk = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS
    place = tl.arange(0, KEYS)[None, :, None]
    column = tl.arange(0, PADDED)[None, None, :]
    member = chunk * GROUPED + tl.arange(0, GROUPED)[:, None, None]
    head = kv_head * GROUP + member
    in_group, in_head = member < GROUP, column < HEAD_DIM

    length = tl.load(positions + t) + 1
    first = tl.maximum(length - window, 0)
    tiles = (length - first + KEYS - 1) // KEYS
    start = first + tiles * split // SPLITS * KEYS
    end = tl.minimum(first + tiles * (split + 1) // SPLITS * KEYS, length)
    token = tl.arange(0, MOST_TOKENS)
    known = tl.min(tl.load(positions + token, mask=token < tl.num_programs(2), other=2147483647), axis=0)
    table += t * table_stride
    old_key, old_value = _load_rows(
        cache, table, start + place, 0, tl.minimum(end, known), kv_head, column, KV_HEADS, BLOCK_SIZE, HEAD_DIM
    )
    if SCALED:
        old_key_scale, old_value_scale = _load_scales(
            scales, table, start + place, 0, tl.minimum(end, known), kv_head, KV_HEADS, BLOCK_SIZE
        )
    begin(PDL)
    query = tl.load(q + t * q_stride + head * HEAD_DIM + column, mask=in_group & in_head, other=0.0)
    query = query * (LOG2_E / tl.sqrt(HEAD_DIM * 1.0))
    out = tl.zeros([GROUPED, KEYS, PADDED], tl.float32)
    total = tl.zeros([GROUPED, KEYS, 1], tl.float32)
    maximum = tl.full([GROUPED, KEYS, 1], float("-inf"), tl.float32)
    key, value = _load_rows(cache, table, start + place, known, end, kv_head, column, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    key, value = key + old_key, value + old_value  # one of the two is 0
    if SCALED:
        key_scale, value_scale = _load_scales(scales, table, start + place, known, end, kv_head, KV_HEADS, BLOCK_SIZE)
        key_scale, value_scale = key_scale + old_key_scale, value_scale + old_value_scale
    while start < end:
        score = tl.sum(query * key.to(tl.float32), axis=2, keep_dims=True)
        if SCALED:
            score, value_of = score * key_scale, value_scale
        score = tl.where(start + place < end, score, float("-inf"))
        here = value.to(tl.float32)
        start += KEYS
        key, value = _load_rows(cache, table, start + place, 0, end, kv_head, column, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        if SCALED:
            key_scale, value_scale = _load_scales(scales, table, start + place, 0, end, kv_head, KV_HEADS, BLOCK_SIZE)
        larger = tl.maximum(maximum, score)
        shrink, p = tl.exp2(maximum - _finite(larger)), tl.exp2(score - _finite(larger))
        total = total * shrink + p
        if SCALED:
            p = p * value_of
        out = out * shrink + p * here
        maximum = larger

    largest = tl.max(maximum, axis=1, keep_dims=True)
    share = tl.exp2(maximum - _finite(largest))
    slot = (t * HEADS + head) * SPLITS + split
    tl.store(maxima + slot, largest, mask=in_group)
    tl.store(totals + slot, tl.sum(total * share, axis=1, keep_dims=True), mask=in_group)
    out = tl.sum(out * share, axis=1, keep_dims=True)
    tl.store(sums + slot.to(tl.int64) * HEAD_DIM + column, out, mask=in_group & in_head)


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    sums,
    maxima,
    totals,
    out,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [HEAD_DIM] of one head of one token, from all its splits."""
    begin(PDL)
    head = tl.program_id(0)
    slot = tl.arange(0, PADDED_SPLITS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    in_head, in_splits = column < HEAD_DIM, slot < SPLITS
    at = head * SPLITS + slot
    maximum = tl.load(maxima + at, mask=in_splits, other=float("-inf"))
    total = tl.load(totals + at, mask=in_splits, other=0.0)
    part = tl.load(sums + at.to(tl.int64) * HEAD_DIM + column, mask=in_splits & in_head, other=0.0)
    share = tl.exp2(maximum - tl.max(maximum, axis=0, keep_dims=True))
    joined = tl.sum(part * share, axis=0, keep_dims=True) / tl.sum(total * share, axis=0, keep_dims=True)
    tl.store(out + head * HEAD_DIM + column, joined, mask=in_head)


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
    scratch: AttentionScratch,
    scales: torch.Tensor | None = None,
) -> None:
    """Attention of each token's query over its own position and those before it, at most `window` in all.

    q: [t, n_heads, head_dim] f32, which may be a view inside qkv: heads contiguous, the token's stride free. cache:
    [blocks, 2, n_kv_heads, block_size, head_dim] f32, f16 or bf16, or int8 with `scales` f32 [blocks, 2, n_kv_heads,
    block_size], keys at 0 and values at 1. table: [t, max_blocks] int32 ids of a token's blocks in order; the row
    stride may be 0. positions: [t] int32, each within `table` (not checked: it is device memory). out: [t, n_heads *
    head_dim] f32. scratch: of `attention_scratch` for these shapes. Raises `ValueError` when shapes, types, strides or
    the window do not fit.
    """
    check_scales("decode_attention", cache, scales)
    check_attention("decode_attention", q, cache, window, out)
    _check(q, table, positions, scratch)
    (tokens, heads, head_dim), (kv_heads, block_size) = q.shape, cache.shape[2:4]
    padded, splits = triton.next_power_of_2(head_dim), scratch.splits
    grouped = min(MOST_GROUPED, triton.next_power_of_2(heads // kv_heads))
    chunks = -(-(heads // kv_heads) // grouped)
    _split_kernel[(splits, kv_heads * chunks, tokens)](
        q,
        q.stride(0),
        cache,
        scales,
        table,
        table.stride(0),
        positions,
        table.shape[1] * block_size if window is None else window,
        scratch.sums,
        scratch.maxima,
        scratch.totals,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLITS=splits,
        SCALED=scales is not None,
        GROUPED=grouped,
        KEYS=max(1, min(KEY_BYTES // cache.itemsize, TILE // (grouped * padded))),
        PADDED=padded,
        **options(4),
    )
    padded_splits = triton.next_power_of_2(splits)
    _join_kernel[(tokens * heads,)](
        scratch.sums,
        scratch.maxima,
        scratch.totals,
        out,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        PADDED_SPLITS=padded_splits,
        PADDED=padded,
        **options(min(8, max(1, padded_splits * padded // 1024))),
    )


def decode_attention_ref(
    q: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
    scratch: AttentionScratch | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """`decode_attention` in torch, in f64, with a plain softmax over all scores."""
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    for t, position in enumerate(positions.tolist()):
        blocks = cache[table[t].long()].double()
        blocks = blocks if scales is None else blocks * scales[table[t].long()][..., None]
        both = blocks.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, : position + 1]
        keys, values = both if window is None else both[:, :, -window:]
        grouped = q[t].double().reshape(kv_heads, -1, head_dim)
        p = (grouped @ keys.transpose(1, 2) / math.sqrt(head_dim)).softmax(-1)
        out[t] = (p @ values).flatten()


def check_attention(name: str, q: torch.Tensor, cache: torch.Tensor, window: int | None, out: torch.Tensor) -> None:
    """Raise `ValueError` where queries f32 [t, n_heads, head_dim], a KV cache and an output [t, n_heads * head_dim] of
    the kernel `name` do not fit each other, or a window is none."""
    fits = q.ndim == 3 and cache.ndim == 5 and cache.shape[1] == 2 and cache.shape[4] == q.shape[2]
    if not fits or q.shape[1] % cache.shape[2] or out.shape != (q.shape[0], q.shape[1] * q.shape[2]):
        shapes = ", ".join(str(tuple(a.shape)) for a in (q, cache, out))
        raise ValueError(f"{name} shapes do not fit: q, cache, out are {shapes}")
    if q.dtype != torch.float32 or q.stride()[1:] != (q.shape[2], 1) or cache.dtype not in CACHE_TYPES:
        raise ValueError(
            f"{name} wants f32 q with contiguous heads and a f32, f16, bf16 or int8 cache, "
            f"got {q.dtype} with strides {q.stride()}, {cache.dtype}"
        )
    if out.dtype != torch.float32 or not out.is_contiguous() or not cache.is_contiguous():
        raise ValueError(
            f"{name} wants a contiguous cache and contiguous f32 out, "
            f"got strides {cache.stride()}, {out.dtype} with strides {out.stride()}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{name} wants a window of at least 1 or None, got {window}")


def _check(q: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, scratch: AttentionScratch) -> None:
    if scratch.sums.shape != (*q.shape[:2], scratch.splits, q.shape[2]):
        raise ValueError(
            f"decode_attention shapes do not fit: q, scratch are {tuple(q.shape)}, {tuple(scratch.sums.shape)}"
        )
    if q.shape[0] > MAX_BATCH:
        raise ValueError(f"decode_attention takes 1 to {MAX_BATCH} tokens, got {q.shape[0]}")
    check_places("decode_attention", q.shape[0], positions, table)
