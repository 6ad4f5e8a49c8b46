"""Rows of stored weights as f32, and their columns fetched ahead, for products of many tokens (`gemm.py`)."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from cpu_kernels.compiled import subroutine
from cpu_kernels.lanes import LANES, Code, fetch_at
from cpu_kernels.row_sum import column_bytes
from cpu_kernels.row_types import has_tail, type_like, weight_of


@intrinsic
def _widen_vectors(typing_context: Any, like: Any, row: Any, first: Any, last: Any, end: Any, out: Any) -> Any:
    """Columns [first, last) of the row at address `row`, but for a tail, as f32 at address `out`."""
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind.widen(Code(context, builder), args[1], (args[2], args[3]), args[4], args[5])
        return context.get_dummy_value()

    return types.void(like, *(types.int64,) * 5), generate


@subroutine
def widen_columns(like, row, first, last, end, out):  # type: ignore[no-untyped-def]
    """out[: last - first] = those columns of the row at address `row`; rows in blocks fill whole groups of 128.

    first: a multiple of 128. end: bytes of a row before its scales.
    """
    _widen_vectors(like, row, first, last, end, out.ctypes.data)
    if has_tail(like):
        for j in range(first + ((last - first) & -LANES), last):
            out[j - first] = weight_of(like, row, j)


@subroutine
def fetch_columns(like, row, row_bytes, count, first, columns):  # type: ignore[no-untyped-def]
    """Fetch so many columns from `first` on of `count` rows from the address `row` on, which are packed next, while the
    tokens pass by."""
    size = column_bytes(like, columns)
    at = row + column_bytes(like, first)
    for i in range(count):
        for line in range(0, size, 64):
            fetch_at(at + i * row_bytes + line)
