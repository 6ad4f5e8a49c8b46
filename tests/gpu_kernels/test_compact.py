"""Index compaction on the GPU, against its reference."""

import pytest
import torch
import triton
import triton.language as tl
from gpu_cases import DEVICE

from gpu_kernels.compact import compact, compact_indices, compact_indices_ref


def _masks(f: int, share: float, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(1, 2**32, (f,), generator=draw).to(torch.int32)  # bit 31 is the sign
    return (bits * (torch.rand(f, generator=draw) < share)).to(DEVICE)


def _outputs(hot: int, cold: int) -> list[torch.Tensor]:
    """Filled with what no kernel writes, so that a gap or a write too many shows."""
    sides = ((size, fill, dtype) for n in (hot, cold) for size, fill, dtype in _side(n))
    return [torch.full((size,), fill, dtype=dtype, device=DEVICE) for size, fill, dtype in sides]


def _side(n: int):
    return (n, -7, torch.int32), (n, 0, torch.int32), (1, -7, torch.int32)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("f", "hot"), [(1, 0), (1, 1), (17, 1), (300, 129), (300, 0), (300, 300), (9000, 4300)])
def test_equals_reference(f, hot, share):
    masks, found, expected = _masks(f, share), _outputs(hot, f - hot), _outputs(hot, f - hot)
    compact_indices(masks, hot, *found)
    compact_indices_ref(masks, hot, *expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("at", [0, 4095, 4096, 8999])
def test_one_neuron(at):
    masks = torch.zeros(9000, dtype=torch.int32, device=DEVICE)
    masks[at] = -(2**31)
    hot_ids, hot_masks, hot_count, cold_ids, cold_masks, cold_count = _outputs(4096, 4904)
    compact_indices(masks, 4096, hot_ids, hot_masks, hot_count, cold_ids, cold_masks, cold_count)
    assert (int(hot_count), int(cold_count)) == ((1, 0) if at < 4096 else (0, 1))
    ids, its_masks = (hot_ids, hot_masks) if at < 4096 else (cold_ids, cold_masks)
    assert (int(ids[0]), int(its_masks[0])) == (at, -(2**31))


@triton.jit
def _ranges_kernel(masks, bounds, ids, ids_masks, count, BLOCK: tl.constexpr):
    """A caller that reads its range from the device."""
    tl.store(count, compact(masks, tl.load(bounds), tl.load(bounds + 1), ids, ids_masks, BLOCK))


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (37, 37), (37, 38), (63, 257)])
def test_compact_from_another_kernel(start, stop):
    masks, bounds = _masks(300, 0.5), torch.tensor([start, stop], dtype=torch.int32, device=DEVICE)
    ids, ids_masks, count = _outputs(0, 300)[3:]
    _ranges_kernel[(1,)](masks, bounds, ids, ids_masks, count, BLOCK=64)
    expected = [i for i in range(start, stop) if masks[i]]
    assert int(count) == len(expected)
    assert ids[: len(expected)].tolist() == expected
    assert torch.equal(ids_masks[: len(expected)], masks[expected])
    assert (ids[len(expected) :] == -7).all()


def test_refuses_wrong_shapes_and_types():
    masks, outputs = _masks(17, 0.5), _outputs(9, 8)
    with pytest.raises(ValueError, match="hot of 0 to f"):
        compact_indices(masks, 18, *outputs)
    with pytest.raises(ValueError, match="int32 masks"):
        compact_indices(masks.long(), 9, *outputs)
    with pytest.raises(ValueError, match="cold_ids of at least 9"):
        compact_indices(masks, 8, *outputs)
    with pytest.raises(ValueError, match=r"int32 hot_count of at least 1, got torch.int64"):
        compact_indices(masks, 9, *outputs[:2], outputs[2].long(), *outputs[3:])
