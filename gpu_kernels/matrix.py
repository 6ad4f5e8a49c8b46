"""`DeviceMatrix`: a weight matrix on the GPU, its rows byte for byte as the CPU's kernels store them.

bf16, f16, f32   rows [n, columns] of that type
int8, int4       rows [n, bytes of a row] of bytes, as `cpu_kernels/contract.py` lays them out
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpu_kernels.contract import BLOCK, INT4_OFFSET, LAYOUTS, RowLayout, padded

# Types of the rows' tensors. Kernels know these kinds and refuse to be compiled for another.
KINDS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "int8": torch.uint8, "int4": torch.uint8}


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    words = stored.view(torch.int16).view(len(stored), -1, 1, BLOCK)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=words.device)[:, None]
    return ((words >> shifts) & 15).float() - INT4_OFFSET


# The codes, f32, of uint8 [n, bytes].
_CODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": lambda stored: stored.view(torch.int8).float(),
    "int4": _nibbles,
}


@dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """`rows`: contiguous rows of `columns` weights, of `KINDS[kind]`. Raises `ValueError` for another kind or width."""

    rows: torch.Tensor
    columns: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        width = self.layout.elements(self.columns)
        fits = self.rows.ndim == 2 and self.rows.shape[1] == width and self.rows.dtype == KINDS[self.kind]
        if not fits or not self.rows.is_contiguous():
            raise ValueError(
                f"{self.kind} rows of {self.columns} weights are contiguous {KINDS[self.kind]} [n, {width}], "
                f"got {self.rows.dtype} {tuple(self.rows.shape)}"
            )

    @property
    def layout(self) -> RowLayout:
        """How a row's weights lie."""
        return LAYOUTS[self.kind]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def widen(self) -> torch.Tensor:
        """All weights as f32 [n, columns]: the kernels' reference."""
        if not self.layout.in_blocks:
            return self.rows.float()
        n, width, split = self.rows.shape[0], padded(self.columns), self.layout.codes_bytes(self.columns)
        scales = self.rows[:, split:].contiguous().view(torch.float16).float()
        codes = _CODES[self.kind](self.rows[:, :split].contiguous())
        wide = codes.reshape(n, width // BLOCK, BLOCK) * scales[:, :, None]
        return wide.view(n, width)[:, : self.columns].contiguous()
