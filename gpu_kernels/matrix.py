"""`DeviceMatrix`: a weight matrix on the GPU, its rows byte for byte as the CPU's kernels store them.

    bf16, f16, f32   rows [n, columns] of that type
    int8             rows [n, P + P/16] of bytes: P codes, then P/32 f16 scales, one per block of 32 columns
    int4             rows [n, P/2 + P/16] of bytes: P/4 16-bit words of four codes + 8, then the scales

P is `columns` rounded up to 128. Word i of a group of 128 columns holds the codes of columns i, 32 + i, 64 + i and
96 + i, lowest bits first. A weight is code * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP, BLOCK = 128, 32
KINDS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "int8": torch.uint8, "int4": torch.uint8}


def padded(columns: int) -> int:
    """`columns` rounded up to whole groups."""
    return -(-columns // GROUP) * GROUP


def row_width(kind: str, columns: int) -> int:
    """Elements of a row in its tensor."""
    if kind == "int8":
        return padded(columns) + padded(columns) // 16
    return padded(columns) // 2 + padded(columns) // 16 if kind == "int4" else columns


@dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """`rows`: contiguous [n, row_width] of `KINDS[kind]`, each row `columns` weights. Raises `ValueError`."""

    rows: torch.Tensor
    columns: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        width = row_width(self.kind, self.columns)
        fits = self.rows.ndim == 2 and self.rows.shape[1] == width and self.rows.dtype == KINDS[self.kind]
        if not fits or not self.rows.is_contiguous():
            raise ValueError(
                f"{self.kind} rows of {self.columns} weights are contiguous {KINDS[self.kind]} [n, {width}], "
                f"got {self.rows.dtype} {tuple(self.rows.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def widen(self) -> torch.Tensor:
        """All weights as f32 [n, columns]: the kernels' reference."""
        if self.kind not in ("int8", "int4"):
            return self.rows.float()
        n, width = self.rows.shape[0], padded(self.columns)
        split = width if self.kind == "int8" else width // 2
        scales = self.rows[:, split:].contiguous().view(torch.float16).float()
        stored = self.rows[:, :split].contiguous()
        if self.kind == "int8":
            codes = stored.view(torch.int8).float()
        else:
            words = stored.view(torch.int16).view(n, width // GROUP, 1, BLOCK)
            shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=words.device)[:, None]
            codes = ((words >> shifts) & 15).float() - 8
        wide = codes.reshape(n, width // BLOCK, BLOCK) * scales[:, :, None]
        return wide.view(n, width)[:, : self.columns].contiguous()
