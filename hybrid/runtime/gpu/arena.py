"""`DeviceArena`: one allocation on the GPU from which all of an engine's tensors there are cut.

One slab, because the allocator of torch rounds every large tensor up to 2 MiB, and because a budget is kept for certain
only where nothing is allocated later. Its size is found by a run of the same requests over a counting arena, whose
tensors have no memory; so what is planned and what is taken cannot differ.
"""

from __future__ import annotations

import math

import torch

from hybrid.errors import BudgetError
from placement.plan import aligned


class DeviceArena:
    """Tensors on `device`, each at a multiple of `placement.plan.ALIGNMENT` bytes. `spent`: bytes so far, by part."""

    def __init__(self, device: torch.device, capacity: int | None = None) -> None:
        """capacity: bytes of the slab; None only counts. Raises `BudgetError` where the device has not so much."""
        self.device, self.spent = device, dict[str, int]()
        self._slab: torch.Tensor | None = None
        self._used = 0
        if capacity is not None:
            try:
                self._slab = torch.empty(capacity, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise BudgetError(
                    f"the GPU has no {capacity / 2**30:.2f} GiB free in one piece; lower the VRAM budget or the context"
                ) from error

    @property
    def counts_only(self) -> bool:
        return self._slab is None

    @property
    def used(self) -> int:
        """Bytes of all tensors."""
        return self._used

    def empty(self, part: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised tensor, counted as `part`. Raises `RuntimeError` when the slab is full."""
        size = aligned(math.prod(shape) * dtype.itemsize)
        start, self._used = self._used, self._used + size
        self.spent[part] = self.spent.get(part, 0) + size
        if self._slab is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        if self._used > len(self._slab):
            raise RuntimeError(f"{part} needs {self._used} bytes of a slab of {len(self._slab)}")
        return self._slab[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def zeros(self, part: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same, of zeros."""
        return self.empty(part, shape, dtype).zero_()

    def put(self, part: str, source: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor on the CPU, which a counting arena does not read."""
        target = self.empty(part, tuple(source.shape), source.dtype)
        return target if self.counts_only else target.copy_(source)
