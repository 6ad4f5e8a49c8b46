"""The arena: one slab, aligned pieces, counted by part, and a counting run that asks for the same."""

from itertools import pairwise

import pytest
import torch
from gpu_cases import DEVICE

from hybrid.runtime.gpu.arena import DeviceArena
from placement.plan import ALIGNMENT

device = torch.device(DEVICE)


def take(arena):
    """Tensors of awkward sizes and every dtype that the runtime takes."""
    return [
        arena.empty("a", (1,)),
        arena.empty("a", (17, 3), torch.bfloat16),
        arena.zeros("b", (129,), torch.uint8),
        arena.put("c", torch.arange(513, dtype=torch.int64)),
        arena.empty("c", (0, 5)),
        arena.put("c", torch.arange(6.0).view(2, 3).T),
    ]


def test_pieces_of_the_slab_are_aligned_disjoint_and_hold_what_is_put():
    arena = DeviceArena(device, 8192)
    tensors = take(arena)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    first = spans[0][0]
    assert all((start - first) % ALIGNMENT == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert [t.unique().tolist() for t in tensors if t.numel()] == [[1], [2], [3], [4], [6]]
    again = take(DeviceArena(device, 8192))
    assert again[2].tolist() == [0] * 129 and again[3].tolist() == list(range(513))
    assert again[5].tolist() == [[0, 3], [1, 4], [2, 5]] and again[5].is_contiguous()
    assert [t.dtype for t in again] == [t.dtype for t in tensors] and again[1].shape == (17, 3)


def test_counting_gives_the_bytes_that_are_then_taken():
    counting = DeviceArena(device)
    shapes = [tensor.shape for tensor in take(counting)]
    assert counting.counts_only and counting.used == sum(counting.spent.values())
    arena = DeviceArena(device, counting.used)
    assert [tensor.shape for tensor in take(arena)] == shapes
    assert (arena.used, arena.spent) == (counting.used, counting.spent)
    assert arena.spent == {"a": 2 * ALIGNMENT, "b": ALIGNMENT, "c": 9 * ALIGNMENT + ALIGNMENT}


def test_a_full_slab_names_the_part():
    arena = DeviceArena(device, 1024)
    arena.empty("a", (200,))
    with pytest.raises(RuntimeError, match="hot neurons needs 1536 bytes of a slab of 1024"):
        arena.empty("hot neurons", (1,))
