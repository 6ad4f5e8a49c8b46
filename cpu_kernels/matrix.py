"""`Matrix`: a weight matrix as the kernels see it, whatever type its rows are stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cpu_kernels.blocks import ARRAY_TYPES, Blocks, dequantize, quantize, row_bytes
from cpu_kernels.lanes import kernel_view, widen_ref

DType = Literal["bf16", "f16", "f32", "int8", "int4"]
DTYPES: dict[str, np.dtype] = {
    "bf16": np.dtype(np.uint16),
    "f16": np.dtype(np.int16),
    "f32": np.dtype(np.float32),
    **ARRAY_TYPES,
}
_NAMES: dict[np.dtype, DType] = {kind: name for name, kind in DTYPES.items()}  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class Matrix:
    """`rows`: C-contiguous [n, width] in one of `DTYPES`, each row `columns` weights; may be memory-mapped."""

    rows: np.ndarray
    columns: int

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.dtype not in _NAMES or not self.rows.flags.c_contiguous:
            raise ValueError(f"a matrix is C-contiguous rows of bf16, f16, f32, int8 or int4, got {self.rows.dtype}")
        width = row_width(self.dtype, self.columns)
        if self.rows.shape[1] != width:
            raise ValueError(f"{self.dtype} rows of {self.columns} weights are {width} wide, got {self.rows.shape[1]}")

    @classmethod
    def of(cls, weight: torch.Tensor, blocks: Blocks | None = None) -> Matrix:
        """A 2-D CPU tensor: bf16, f16 and f32 as they are, without a copy where contiguous; or stored in `blocks`."""
        if blocks is not None:
            return cls(quantize(weight.float().numpy(), blocks), weight.shape[1])
        return cls(kernel_view(weight.contiguous()), weight.shape[1])

    @property
    def dtype(self) -> DType:
        return _NAMES[self.rows.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def widen(self, rows: slice | np.ndarray = slice(None)) -> torch.Tensor:
        """The weights of some rows as f32 [k, columns], on the CPU."""
        chosen = self.rows[rows]
        if self.rows.dtype in (np.int8, np.uint8):
            return torch.from_numpy(dequantize(chosen, self.columns))
        return torch.from_numpy(widen_ref(chosen))


def row_width(dtype: DType, columns: int) -> int:
    """Elements of a row of `columns` weights in its array."""
    return row_bytes(dtype, columns) if dtype in ("int8", "int4") else columns
