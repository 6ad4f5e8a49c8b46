"""`Matrix`: a weight matrix as the kernels see it, whatever type its rows are stored in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels.blocks import quantize
from cpu_kernels.contract import BLOCK, GROUP, INT4_OFFSET, Blocks, DType, padded
from cpu_kernels.lanes import kernel_view
from cpu_kernels.row_type import RowType
from cpu_kernels.row_types import row_type


@dataclass(frozen=True, eq=False)
class Matrix:
    """`rows`: C-contiguous [n, width], the array of a `RowType`, each row `columns` weights; may be memory-mapped.

    Raises `ValueError` for others.
    """

    rows: np.ndarray
    columns: int

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not self.rows.flags.c_contiguous:
            raise ValueError(f"a matrix is C-contiguous rows, got {self.rows.ndim} axes, strides {self.rows.strides}")
        width = self.kind.layout.elements(self.columns)
        if self.rows.shape[1] != width:
            raise ValueError(f"{self.dtype} rows of {self.columns} weights are {width} wide, got {self.rows.shape[1]}")

    @classmethod
    def of(cls, weight: torch.Tensor, blocks: Blocks | None = None) -> Matrix:
        """A 2-D CPU tensor: bf16, f16 and f32 as they are, without a copy where contiguous; or stored in `blocks`."""
        if blocks is not None:
            return cls(quantize(weight.float().numpy(), blocks), weight.shape[1])
        return cls(kernel_view(weight.contiguous()), weight.shape[1])

    @property
    def kind(self) -> RowType:
        """How the rows are stored."""
        return row_type(self.rows.dtype)

    @property
    def dtype(self) -> DType:
        return self.kind.layout.name

    @property
    def like(self) -> np.ndarray:
        """An array of one row of 128 columns whose type says how rows are stored; the same for mapped rows, which are
        read-only and would have every kernel compiled once more."""
        return np.empty((1, self.kind.layout.elements(GROUP)), self.rows.dtype)

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
        if self.kind.layout.in_blocks:
            return _as_tensor(self.rows[rows].view(np.uint8))
        return self._floats(self.rows[rows])

    def widen(self, rows: slice | np.ndarray = slice(None)) -> torch.Tensor:
        """The weights of some rows as f32 [k, columns], on the CPU, by torch's threads."""
        if self.kind.layout.in_blocks:
            return _widen_blocks(self.rows[rows], self.kind, self.columns)
        return self._floats(self.rows[rows]).float()

    def _floats(self, stored: np.ndarray) -> torch.Tensor:
        # torch does not take NumPy's uint16; as signed integers every type of floats passes.
        return _as_tensor(stored.view(f"i{stored.itemsize}")).view(_TORCH_TYPES[self.dtype])


_TORCH_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A view; torch warns of a read-only one, such as a memory-mapped file's, which nothing here writes to."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    words = stored.contiguous().view(torch.int16).view(len(stored), stored.shape[1] // (GROUP // 2), 1, BLOCK)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16)[:, None]
    return ((words >> shifts) & 15).float().sub_(INT4_OFFSET)


# The codes, f32, of int8 [n, bytes].
_CODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"int8": torch.Tensor.float, "int4": _nibbles}


def _widen_blocks(rows: np.ndarray, kind: RowType, d: int) -> torch.Tensor:
    """As `blocks.dequantize`, in torch."""
    n, width, codes_bytes = len(rows), padded(d), kind.layout.codes_bytes(d)
    raw = _as_tensor(rows.view(np.int8))
    scales = raw[:, codes_bytes:].contiguous().view(torch.float16).float()
    codes = _CODES[kind.layout.name](raw[:, :codes_bytes]).view(n, width // BLOCK, BLOCK)
    return codes.mul_(scales[:, :, None]).view(n, width)[:, :d]
