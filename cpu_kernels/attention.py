"""Decode attention: one query per head over the keys and values of a block table, with grouped heads (GQA).

    out[h] = sum over i of  p[i] * V[i],     p = softmax over i of  q[h] . K[i] / sqrt(head_dim)

for the positions i in [first, length), with the keys K and values V of KV head h // (n_heads // n_kv_heads). One pass
(online softmax, arXiv 1805.02867): a block at a time, the sums so far rescaled when the largest score grows. Of keys
and values in int8 the codes are read as they are: a score is multiplied with its key's scale, p with its value's.

Threads: workers take ranges of query heads. Each head goes through its blocks in order and alone, so the answer is the
same for any number of workers and wherever the blocks lie. Heads of one group at one worker go through the blocks
together, so that a block is read from memory once. The next block is fetched meanwhile: 8000 positions of 8 KV heads
for 32 heads took 7.2 ms on one core, 10.7 without.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.lanes import FAST_SUMS, as_f32, fetch, stored_view
from cpu_kernels.rope import check_scales
from cpu_kernels.worker_pool import WorkerPool

_LOG2_E = np.float32(math.log2(math.e))
# ln 2 as a sum whose first part has 9 bits, so that its product with a whole number below 2^15 is exact.
_LN2_HIGH, _LN2_LOW = np.float32(355 / 512), np.float32(math.log(2) - 355 / 512)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves a whole number in the low bits of an f32
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))
_LINE_BYTES = 64
_SMALLEST = np.float32(-87)  # below this exp leaves the normal f32 numbers; there exp(-87) = 2e-38 is returned


@njit(fastmath={"contract"}, nogil=True, forceinline=True)
def exp(x):  # type: ignore[no-untyped-def]
    """e^x for f32 x <= 0, within 3 units in the last place; unlike the library's it vectorises: 0.3 ns for 2.4."""
    x = _SMALLEST if x < _SMALLEST else x
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    one = np.float32(1)
    series = one + r * (one + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    exponent = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
    return series * np.int32(exponent + np.int32(127 << 23)).view(np.float32)


@njit(nogil=True, forceinline=True)
def _fetch_rows(rows):  # type: ignore[no-untyped-def]
    """Fetch rows that will be read soon into L2."""
    for i in range(rows.shape[0]):
        for j in range(0, rows.shape[1], _LINE_BYTES // rows.itemsize):
            fetch(rows[i], j)


@subroutine(fastmath=FAST_SUMS)
def _score(q, keys, scores, ahead):  # type: ignore[no-untyped-def]
    """scores[i] = q . keys[i]; four keys at a time share the loads of q: 5 ns a key of 128, 9 one at a time."""
    n, head_dim = keys.shape
    share = -(-4 * ahead.shape[0] // n)
    for i in range(0, n & -4, 4):
        _fetch_rows(ahead[i // 4 * share : (i // 4 + 1) * share])
        k0, k1, k2, k3 = keys[i], keys[i + 1], keys[i + 2], keys[i + 3]
        s0 = s1 = s2 = s3 = np.float32(0)
        for j in range(head_dim):
            s0 += q[j] * as_f32(k0[j])
            s1 += q[j] * as_f32(k1[j])
            s2 += q[j] * as_f32(k2[j])
            s3 += q[j] * as_f32(k3[j])
        scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = s0, s1, s2, s3
    for i in range(n & -4, n):
        s0 = np.float32(0)
        for j in range(head_dim):
            s0 += q[j] * as_f32(keys[i, j])
        scores[i] = s0


@subroutine(fastmath=FAST_SUMS)
def _add_values(p, values, out, ahead):  # type: ignore[no-untyped-def]
    """out += sum over i of p[i] * values[i]; four rows at a time: 6 ns a row of 128, 21 one at a time."""
    n, head_dim = values.shape
    share = -(-4 * ahead.shape[0] // n)
    for i in range(0, n & -4, 4):
        _fetch_rows(ahead[i // 4 * share : (i // 4 + 1) * share])
        v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        p0, p1, p2, p3 = p[i], p[i + 1], p[i + 2], p[i + 3]
        for j in range(head_dim):
            out[j] += (p0 * as_f32(v0[j]) + p1 * as_f32(v1[j])) + (p2 * as_f32(v2[j]) + p3 * as_f32(v3[j]))
    for i in range(n & -4, n):
        for j in range(head_dim):
            out[j] += p[i] * as_f32(values[i, j])


@subroutine(fastmath=FAST_SUMS)
def _attend_block(q, keys, values, scales, next_keys, next_values, scores, state, out):  # type: ignore[no-untyped-def]
    """Add one block's keys and values [n, head_dim] to a head's sums; state holds its largest score and its sum of p.

    scales: of keys and of values, each [n], or None. Meanwhile the rows in next_keys and next_values are fetched into
    L2.
    """
    n, head_dim = keys.shape
    scale = np.float32(1 / math.sqrt(head_dim))
    _score(q, keys, scores, next_keys)
    if scales is not None:
        for i in range(n):
            scores[i] *= scales[0][i]
    largest = state[0]
    for i in range(n):
        scores[i] *= scale
        largest = max(largest, scores[i])
    shrink = exp(state[0] - largest)
    state[0] = largest
    total = np.float32(0)
    for i in range(n):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    state[1] = state[1] * shrink + total
    if scales is not None:
        for i in range(n):
            scores[i] *= scales[1][i]
    for j in range(head_dim):
        out[j] *= shrink
    _add_values(scores, values, out, next_values)


def _scales_of(scales: np.ndarray, block: int, g: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales of the keys and of the values of one block of KV head g; None where there are none."""
    raise NotImplementedError("called from compiled code only")


@overload(_scales_of, strict=False, jit_options={"nogil": True, "forceinline": True})
def _scales_of_type(scales: Any, block: Any, g: Any, start: Any, end: Any) -> Any:
    if scales == types.none:
        return lambda scales, block, g, start, end: None
    return lambda scales, block, g, start, end: (scales[block, 0, g, start:end], scales[block, 1, g, start:end])


@subroutine
def _attend_group(q, cache, scales, g, next_g, table, first, length, scratch, out):  # type: ignore[no-untyped-def]
    """The heads q [n, head_dim] of KV head g; each fetches its share of the next block, in the end of next_g's."""
    n, block_size = q.shape[0], cache.shape[3]
    out[:] = 0
    scratch[:, block_size] = -np.inf
    scratch[:, block_size + 1] = 0
    last = (length - 1) // block_size
    for b in range(first // block_size, last + 1):
        start, end = max(first - b * block_size, 0), min(length - b * block_size, block_size)
        keys, values = cache[table[b], 0, g, start:end], cache[table[b], 1, g, start:end]
        both = _scales_of(scales, table[b], g, start, end)
        following, head = (b + 1, g) if b < last else (first // block_size, next_g)
        begin = max(first - following * block_size, 0)
        count = min(length - following * block_size, block_size) - begin if b < last or next_g != g else 0
        for h in range(n):
            low, high = begin + count * h // n, begin + count * (h + 1) // n
            next_keys, next_values = (
                cache[table[following], 0, head, low:high],
                cache[table[following], 1, head, low:high],
            )
            scores, state = scratch[h, :block_size], scratch[h, block_size:]
            _attend_block(q[h], keys, values, both, next_keys, next_values, scores, state, out[h])
    for h in range(n):
        for j in range(q.shape[1]):  # a division of the whole row would allocate
            out[h, j] /= scratch[h, block_size + 1]


@kernel
def attend_heads(worker, workers, q, cache, scales, table, first, length, scratch, out):  # type: ignore[no-untyped-def]
    """This worker's heads of `decode_attention` over positions [first, length).

    scratch: [n_heads, block_size + 2] f32, of which each head uses its own row.
    """
    group = q.shape[0] // cache.shape[2]
    start, end = q.shape[0] * worker // workers, q.shape[0] * (worker + 1) // workers
    last = -(-end // group) - 1
    for g in range(start // group, last + 1):
        low, high = max(start, g * group), min(end, (g + 1) * group)
        following, mine = min(g + 1, last), scratch[low:high]
        _attend_group(q[low:high], cache, scales, g, following, table, first, length, mine, out[low:high])


def decode_attention(
    q: np.ndarray,
    cache: np.ndarray,
    table: np.ndarray,
    length: int,
    window: int | None,
    out: np.ndarray,
    pool: WorkerPool,
    scales: np.ndarray | None = None,
) -> None:
    """Attention of the query at position `length` - 1 over itself and what came before, at most `window` positions.

    q, out: [n_heads, head_dim] f32, n_heads a multiple of n_kv_heads. cache: [blocks, 2, n_kv_heads, block_size,
    head_dim] f32 or f16, or int8 with `scales` f32 [blocks, 2, n_kv_heads, block_size], keys at 0 and values at 1.
    table: int32 ids of the sequence's blocks in order. Raises `ValueError` when shapes, types, strides, the length, the
    window or a block id do not fit.
    """
    _check(q, cache, table, out)
    check_scales("decode_attention", cache, scales)
    kv_heads, block_size, head_dim = cache.shape[2:]
    if not 1 <= length <= table.size * block_size or (window is not None and window < 1):
        raise ValueError(
            f"decode_attention wants 1 to {table.size * block_size} keys and a window of at least 1 or None, "
            f"got {length} and {window}"
        )
    first = 0 if window is None else max(0, length - window)
    used = table[first // block_size : (length - 1) // block_size + 1]
    if used.min() < 0 or used.max() >= cache.shape[0]:
        raise ValueError(f"block ids {used.min()} to {used.max()} leave the cache of {cache.shape[0]} blocks")
    workers = min(len(q), pool.workers_for(2 * (length - first) * kv_heads * head_dim * cache.itemsize))
    scratch = np.empty((len(q), block_size + 2), np.float32)
    pool.run(attend_heads, workers, q, stored_view(cache), scales, table, first, length, scratch, out)


def decode_attention_ref(
    q: np.ndarray,
    cache: np.ndarray,
    table: np.ndarray,
    length: int,
    window: int | None,
    out: np.ndarray,
    pool: WorkerPool | None,
    scales: np.ndarray | None = None,
) -> None:
    """`decode_attention` in NumPy, in f64, with a plain softmax over all scores."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    used = table[: -(-length // block_size)]
    blocks = cache[used].astype(np.float64)
    if scales is not None:
        blocks *= scales[used][..., None]
    both = blocks.transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    keys, values = both[:, :, :length][:, :, 0 if window is None else -window :]
    grouped = q.astype(np.float64).reshape(kv_heads, -1, head_dim)
    scores = grouped @ keys.swapaxes(1, 2) / math.sqrt(head_dim)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out[:] = (p / p.sum(-1, keepdims=True) @ values).reshape(out.shape)


def _check(q: np.ndarray, cache: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    fits = q.ndim == 2 and out.shape == q.shape and cache.ndim == 5 and cache.shape[1] == 2
    if not fits or cache.shape[4] != q.shape[1] or len(q) % cache.shape[2] or table.ndim != 1:
        raise ValueError(
            f"decode_attention shapes do not fit: "
            f"q {q.shape}, out {out.shape}, cache {cache.shape}, table {table.shape}"
        )
    typed = (
        q.dtype == out.dtype == np.float32
        and cache.dtype in (np.float32, np.float16, np.int8)
        and table.dtype == np.int32
    )
    if not typed or not all(a.flags.c_contiguous for a in (q, cache, out)):
        raise ValueError(
            f"decode_attention wants C-contiguous f32 q and out, f32, f16 or int8 cache and an int32 table, "
            f"got {q.dtype}, {cache.dtype}, {out.dtype}, {table.dtype}"
        )
