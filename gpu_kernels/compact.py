"""Index compaction on the GPU: the ids of neurons that fire, in rising order, without asking the host.

    ids = [i for i in start .. stop - 1 if masks[i] != 0],  ids_masks = masks[ids],  count = len(ids)

No atomics: the order is the same on every run. One program compacts a range, or a piece of it, after it has counted
what comes before. `compact` and `count_fired` are for other kernels to call: who hands ids over compacts on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_kernels.launch import begin, options

_BLOCK, _WARPS = 4096, 8  # 1100 issue cycles per block on an SM; 16 warps take 1500


@triton.jit
def compact(masks_ptr, start, stop, ids_ptr, ids_masks_ptr, BLOCK: tl.constexpr, base=0):  # type: ignore[no-untyped-def]
    """Write i - base of the i in [start, stop) with masks[i] != 0 to ids int32, masks[i] to ids_masks int32; returns
    the count.

    Called by all threads of one program. Both outputs may lie in pinned host memory: nothing is written twice or read
    back, and nothing beyond the count. The caller orders these writes before what releases them.
    """
    count = tl.full([], 0, tl.int32)
    first = start + count
    while first < stop:
        i = first + tl.arange(0, BLOCK)
        mask = tl.load(masks_ptr + i, mask=i < stop, other=0)
        kept = (mask != 0).to(tl.int32)
        # Stores have another layout than sums; so one int32 a neuron crosses over, and not both pointers.
        place = tl.where(kept != 0, count + tl.cumsum(kept, 0) - 1, -1).to(tl.int64)
        tl.store(ids_ptr + place, i - base, mask=place >= 0)
        tl.store(ids_masks_ptr + place, mask, mask=place >= 0)
        count += tl.sum(kept, 0)
        first += BLOCK
    return count


@triton.jit
def count_fired(masks_ptr, start, stop, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of masks[start .. stop - 1] are not 0: where the list of who compacts what follows begins."""
    fired = tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        i = first + tl.arange(0, BLOCK)
        fired += (tl.load(masks_ptr + i, mask=i < stop, other=0) != 0).to(tl.int32)
    return tl.sum(fired, 0)


# A size of 1 would be compiled in, and a loop over it fails to compile.
@triton.jit(do_not_specialize=["f", "hot"])
def _compact_kernel(  # type: ignore[no-untyped-def]
    masks, f, hot, hot_ids, hot_masks, hot_count, cold_ids, cold_masks, cold_count, BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    if tl.program_id(0) == 0:
        tl.store(hot_count, compact(masks, 0, hot, hot_ids, hot_masks, BLOCK))
    else:
        tl.store(cold_count, compact(masks, hot, f, cold_ids, cold_masks, BLOCK))


def compact_indices(
    masks: torch.Tensor,
    hot: int,
    hot_ids: torch.Tensor,
    hot_masks: torch.Tensor,
    hot_count: torch.Tensor,
    cold_ids: torch.Tensor,
    cold_masks: torch.Tensor,
    cold_count: torch.Tensor,
) -> None:
    """Split the firing neurons into those below `hot` and the rest, each in rising order, ids counted from 0 in both.

    masks: int32 [f]; hot_ids, cold_ids: int32 of at least `hot` and f - hot; hot_masks, cold_masks: int32, the same;
    hot_count, cold_count: int32 [1]. Ids and masks beyond the count are left as they were. Raises `ValueError`.
    """
    f = len(masks)
    if masks.ndim != 1 or masks.dtype != torch.int32 or not 0 <= hot <= f:
        raise ValueError(
            f"compact_indices wants int32 masks [f] and hot of 0 to f, got {masks.dtype} {tuple(masks.shape)} and {hot}"
        )
    sides = (("hot", hot, hot_ids, hot_masks, hot_count), ("cold", f - hot, cold_ids, cold_masks, cold_count))
    for side, size, ids, its_masks, count in sides:
        _check(f"{side}_ids", ids, torch.int32, size)
        _check(f"{side}_masks", its_masks, torch.int32, size)
        _check(f"{side}_count", count, torch.int32, 1)
    hot_side, cold_side = (hot_ids, hot_masks, hot_count), (cold_ids, cold_masks, cold_count)
    _compact_kernel[(2,)](masks, f, hot, *hot_side, *cold_side, BLOCK=_BLOCK, **options(_WARPS))


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int) -> None:
    if tensor.ndim != 1 or len(tensor) < size or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"compact_indices wants contiguous {dtype} {name} of at least {size}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def compact_indices_ref(
    masks: torch.Tensor,
    hot: int,
    hot_ids: torch.Tensor,
    hot_masks: torch.Tensor,
    hot_count: torch.Tensor,
    cold_ids: torch.Tensor,
    cold_masks: torch.Tensor,
    cold_count: torch.Tensor,
) -> None:
    """`compact_indices` in torch."""
    fires = masks.nonzero()[:, 0]
    sides = ((fires < hot, hot_ids, hot_masks, hot_count), (fires >= hot, cold_ids, cold_masks, cold_count))
    for side, ids, its_masks, count in sides:
        found = fires[side]
        ids[: len(found)] = found.int()
        its_masks[: len(found)] = masks[found]
        count.fill_(len(found))
