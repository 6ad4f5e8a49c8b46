"""`RowType`: how the weights of a row are stored, and the vector code that reads them; one object for each type.

All that differs between types is in its object: who adds a type writes one and lists it in `row_types.py`, and every
kernel takes its rows. An array of a type that has no object is refused when a kernel is compiled for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.contract import BLOCK, RowLayout
from cpu_kernels.lanes import Code


class FourRows(NamedTuple):
    """Addresses of four rows, and of those read next, from which lines are fetched meanwhile; LLVM values."""

    addresses: list[Any]
    ahead: list[Any]


class Sums(NamedTuple):
    """Where sums of scaled rows are kept, addresses of f32: `sums` [P], and for types that need them `offsets` [P / 32]
    and for each of four rows a `table` [2 P / 32]."""

    sums: Any
    offsets: Any
    tables: list[Any]


class Panel(NamedTuple):
    """Where 16 rows go in a panel of codes, addresses: their first pairs and their scales; and the bytes from one pair
    of columns, or block, to the next."""

    pairs: Any
    scales: Any
    width: Any


class RowType(ABC):
    """A type of rows. The methods write LLVM code: they are called when a kernel is compiled.

    layout: bits, group and sizes. array: the type of the rows' array, by which compiled code knows them: NumPy has no
    bf16 and no 4-bit type, so each type has another of NumPy's. columns_unit: slices of the columns of a sum begin and
    end at multiples of it, but for the row's end. has_tail: whether the methods leave what follows the last whole
    vector to `row_dot.py`, `row_sum.py` and `widen.py`. in_order: whether sums lie in the order of the columns. terms:
    numbers of bf16 of which any weight is the sum (`terms.py`).
    """

    columns_unit: int = BLOCK
    has_tail: bool
    in_order: bool = True
    terms: int = 3

    def __init__(self, layout: RowLayout, array: np.dtype) -> None:
        self.layout, self.array = layout, array

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.layout.bits

    @property
    def group(self) -> int:
        """Weights to a multiple of which rows are padded."""
        return self.layout.group

    @abstractmethod
    def dot(self, code: Code, rows: FourRows, v: list[Any], n: Any) -> list[Any]:
        """Four rows of `n` weights times the input whose forms (`inputs.Input`) are at the addresses `v`: four f32."""

    @abstractmethod
    def sum(self, code: Code, rows: FourRows, scales: list[Any], to: Sums, part: tuple[Any, Any], end: Any) -> None:
        """to.sums += the four rows, each times its f32 of `scales`, in the columns [first, last) that `part` says.

        end: bytes of a row before its scales.
        """

    @abstractmethod
    def widen(self, code: Code, row: Any, part: tuple[Any, Any], end: Any, out: Any) -> None:
        """Columns [first, last) of the row at address `row`, that `part` says, as f32 at address `out`; first is a
        multiple of the group. end: bytes of a row before its scales."""

    def panel(self, code: Code, rows: list[Any], group: Any, end: Any, to: Panel) -> None:
        """The codes of one group of 16 rows side by side, as `tiles.py` multiplies them; of rows in blocks alone."""
        raise TypeError(f"rows of {self.layout.name} have no codes")
