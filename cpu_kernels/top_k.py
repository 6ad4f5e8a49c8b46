"""The k largest logits, in falling order; of equal logits, the one with the lower id comes first.

NaN ranks above everything, as in torch, so that a broken model shows up in the first id.

A logit and its id become one int64 whose order is that ranking. Each worker keeps the k best of its range in a heap,
whose root is the smallest kept; most of the range is passed over by comparing the largest of a block with the root.

Threads: the order is total, so the ids are the same for any number of workers and however their heaps are merged.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.worker_pool import WorkerPool

_BLOCK = 64  # logits whose largest is compared first; 32000 with k=40 took 15 us, in blocks of 256 26 us
_ID_BITS = np.int64(2**32 - 1)


@njit(nogil=True, forceinline=True)
def _rank(logit):  # type: ignore[no-untyped-def]
    """An int32 that orders as the f32 does: -0 as 0, NaN of either sign last."""
    bits = np.float32(logit + np.float32(0)).view(np.int32)
    ordered = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(0x7FFFFFFF) if logit != logit else ordered


@njit(nogil=True, forceinline=True)
def _largest_rank(logits):  # type: ignore[no-untyped-def]
    largest = np.int32(-(2**31))
    for i in range(logits.shape[0]):  # from 0, or a check for negative indices keeps it from being vectorised
        largest = max(largest, _rank(logits[i]))
    return largest


@subroutine
def _sift(heap, key, n):  # type: ignore[no-untyped-def]
    """Put `key` in place of the root of the min-heap heap[:n]."""
    at = 0
    while 2 * at + 1 < n:
        child = 2 * at + 1
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if key <= heap[child]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = key


@kernel
def top_k_part(worker, workers, logits, heaps):  # type: ignore[no-untyped-def]
    """Keep the best keys of this worker's range of logits [v] f32 in heaps[worker]; heaps: int64 [workers, k]."""
    v, heap = logits.shape[0], heaps[worker]
    k = heap.shape[0]
    heap[:] = np.iinfo(np.int64).min
    end = v * (worker + 1) // workers
    for start in range(v * worker // workers, end, _BLOCK):
        stop = min(start + _BLOCK, end)
        # Of equal logits the earlier is kept already.
        if _largest_rank(logits[start:stop]) <= heap[0] >> 32:
            continue
        for i in range(start, stop):
            key = (np.int64(_rank(logits[i])) << 32) | (_ID_BITS - i)
            if key > heap[0]:
                _sift(heap, key, k)


@kernel
def top_k_merge(heaps, ids):  # type: ignore[no-untyped-def]
    """Once all workers are done: merge their heaps into the first, and write the ids int32 [k], the best first."""
    heap = heaps[0]
    for worker in range(1, heaps.shape[0]):
        for key in heaps[worker]:
            if key > heap[0]:
                _sift(heap, key, heap.shape[0])
    for n in range(heap.shape[0], 0, -1):
        ids[n - 1] = _ID_BITS - (heap[0] & _ID_BITS)
        _sift(heap, heap[n - 1], n - 1)


def top_k(logits: np.ndarray, k: int, pool: WorkerPool) -> np.ndarray:
    """Ids int32 [k] of the k largest logits, the largest first. logits: [v] f32.

    Raises `ValueError` when k is not in 1 to v, or for other shapes, types or strides.
    """
    if logits.ndim != 1 or logits.dtype != np.float32 or not logits.flags.c_contiguous:
        raise ValueError(f"top_k wants C-contiguous f32 logits of one axis, got {logits.dtype} {logits.shape}")
    if not 1 <= k <= logits.size:
        raise ValueError(f"top_k wants k of 1 to {logits.size}, the number of logits, got {k}")
    workers = pool.workers_for(logits.nbytes)
    heaps, ids = np.empty((workers, k), np.int64), np.empty(k, np.int32)
    pool.run(top_k_part, workers, logits, heaps)
    top_k_merge(heaps, ids)
    return ids


def top_k_ref(logits: np.ndarray, k: int, pool: WorkerPool | None) -> np.ndarray:
    """`top_k` in NumPy."""
    return np.lexsort((-logits, ~np.isnan(logits)))[:k].astype(np.int32)


def argmax(logits: np.ndarray, pool: WorkerPool) -> int:
    """The id of the largest of the logits [v] f32, the lowest among equals. Raises `ValueError` as `top_k` does."""
    return int(top_k(logits, 1, pool)[0])


def argmax_ref(logits: np.ndarray, pool: WorkerPool | None) -> int:
    """`argmax` in NumPy."""
    return int(np.argmax(logits))
