"""`Matrix`: a weight matrix as the kernels see it, whatever type its rows are stored in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cpu_kernels.blocks import ARRAY_TYPES, BLOCK, GROUP, Blocks, padded, quantize, row_bytes
from cpu_kernels.lanes import kernel_view

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
    def like(self) -> np.ndarray:
        """An array of one row of 128 columns whose type says how rows are stored; the same for mapped rows, which are
        read-only and would have every kernel compiled once more."""
        return np.empty((1, row_width(self.dtype, GROUP)), self.rows.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def tensor(self, rows: slice = slice(None)) -> torch.Tensor:
        """A torch view of some rows as they are stored: bf16, f16 or f32 [k, columns], or uint8 [k, bytes of a row]."""
        stored = self.rows[rows]
        if self.dtype in ("int8", "int4"):
            return _as_tensor(stored.view(np.uint8))
        return _as_tensor(stored if self.dtype == "f32" else stored.view(np.int16)).view(_TORCH_TYPES[self.dtype])

    def widen(self, rows: slice | np.ndarray = slice(None)) -> torch.Tensor:
        """The weights of some rows as f32 [k, columns], on the CPU, by torch's threads."""
        stored = self.rows[rows]
        if self.dtype in ("int8", "int4"):
            return _widen_blocks(stored, self.columns)
        return (
            _as_tensor(stored.view(np.int16)).view(_TORCH_TYPES[self.dtype]).float()
            if stored.itemsize == 2
            else (_as_tensor(stored))
        )


_TORCH_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A view; torch warns of a read-only one, such as a memory-mapped file's, which nothing here writes to."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _widen_blocks(rows: np.ndarray, d: int) -> torch.Tensor:
    """As `blocks.dequantize`, in torch."""
    n, width = len(rows), padded(d)
    raw = _as_tensor(rows.view(np.int8))
    codes_bytes = raw.shape[1] - width // 16
    scales = raw[:, codes_bytes:].contiguous().view(torch.float16).float()
    stored = raw[:, :codes_bytes]
    if rows.dtype == np.int8:
        codes = stored.reshape(n, width // BLOCK, BLOCK).float()
    else:
        words = stored.contiguous().view(torch.int16).view(n, width // GROUP, 1, BLOCK)
        shifts = torch.arange(0, 16, 4, dtype=torch.int16)[:, None]
        codes = ((words >> shifts) & 15).float().sub_(8).view(n, width // BLOCK, BLOCK)
    return codes.mul_(scales[:, :, None]).view(n, width)[:, :d]


def row_width(dtype: DType, columns: int) -> int:
    """Elements of a row of `columns` weights in its array."""
    return row_bytes(dtype, columns) if dtype in ("int8", "int4") else columns
