"""Sums of scaled rows, sum_k c[k] * row[k], four rows at a time, which share the loads and stores of the sum.

Sums may lie in another order than the columns, which `finish` puts right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cpu_kernels.blocks import padded
from cpu_kernels.compiled import subroutine
from cpu_kernels.contract import BLOCK, GROUP, INT4_OFFSET
from cpu_kernels.lanes import I64, LANES, Code, weight_at
from cpu_kernels.row_type import FourRows, Sums
from cpu_kernels.row_types import has_tail, row_bits, type_like

_FOUR = types.UniTuple(types.int64, 4)
_SCALES = types.UniTuple(types.float32, 4)
_SUMS = types.Array(types.float32, 1, "C")


@intrinsic
def _add_rows(
    typing_context: Any, like: Any, rows: Any, ahead: Any, scales: Any, sums: Any, offsets: Any, steps: Any,
    first: Any, last: Any, codes_bytes: Any,
) -> Any:  # fmt: skip
    """sums[first:last] += the four rows' columns, each row times its scale; lines of `ahead` are fetched meanwhile."""
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        addresses, coming, factors = ([builder.extract_value(args[at], n) for n in range(4)] for at in (1, 2, 3))
        data, taken = code.data(_SUMS, args[4]), code.data(_SUMS, args[5])
        (size_of_steps,) = cgutils.unpack_tuple(builder, context.make_array(_SUMS)(context, builder, args[6]).shape)
        # A quarter of the elements to each row; 4 bytes each.
        tables = [builder.add(code.data(_SUMS, args[6]), builder.mul(size_of_steps, I64(n))) for n in range(4)]
        part = args[7], args[8]
        kind.sum(code, FourRows(addresses, coming), factors, Sums(data, taken, tables), part, args[9])
        return context.get_dummy_value()

    signature = types.void(like, _FOUR, _FOUR, _SCALES, _SUMS, _SUMS, _SUMS, types.int64, types.int64, types.int64)
    return signature, generate


def _last_columns(like: Any, rows: Any, scales: Any, sums: Any, first: int, last: int) -> None:
    raise NotImplementedError("called from compiled code only")


@overload(_last_columns, inline="always", strict=False)
def _add_last_columns(like: Any, rows: Any, scales: Any, sums: Any, first: Any, last: Any) -> Any:
    """The columns of rows of floats beyond the last whole vector; blocks are padded and have none."""
    if not type_like(like).has_tail:
        return lambda like, rows, scales, sums, first, last: None
    size = type_like(like).array.itemsize

    def add(like, rows, scales, sums, first, last):  # type: ignore[no-untyped-def]
        for j in range(first, last):
            for k in range(4):
                sums[j] += scales[k] * weight_at(like, rows[k] + j * size)

    return add


@subroutine(forceinline=True)
def four_rows(weight, width, ids, k, count):  # type: ignore[no-untyped-def]
    """Addresses of rows ids[k : k + 4]; beyond the end the last again."""
    last = count - 1
    return (
        weight + ids[min(k, last)] * width,
        weight + ids[min(k + 1, last)] * width,
        weight + ids[min(k + 2, last)] * width,
        weight + ids[min(k + 3, last)] * width,
    )


@subroutine
def column_bytes(like, columns):  # type: ignore[no-untyped-def]
    """Bytes of that many columns of a row, without scales."""
    return columns * row_bits(like) >> 3


@subroutine
def sum_rows(  # type: ignore[no-untyped-def]
    like, weight, width, ids, scales, start, stop, ahead, d, first, last, sums, offsets, steps
):  # fmt: skip
    """sums[first:last] += the sum over start <= k < stop of scales[k] * columns [first, last) of row ids[k], added one
    after another: rows with a scale of 0 change no bit.

    weight: address of the matrix, rows of `width` bytes and `d` columns. first and last are multiples of
    `columns_unit`. ahead: four addresses from which lines are fetched along with those of the last four rows.
    sums: f32 [P]; offsets: f32 [P / 32], for int4; steps: f32 [4 * 2 P / 32], a worker's own.
    """
    zero, codes_bytes = np.float32(0), column_bytes(like, padded(d))
    whole, end = last, last
    if has_tail(like):
        end = min(last, d)
        whole = first + ((end - first) & -BLOCK)
    for k in range(start, stop, 4):
        rows = four_rows(weight, width, ids, k, stop)
        coming = four_rows(weight, width, ids, k + 4, stop) if k + 4 < stop else ahead
        factors = (
            scales[k],
            scales[k + 1] if k + 1 < stop else zero,
            scales[k + 2] if k + 2 < stop else zero,
            scales[k + 3] if k + 3 < stop else zero,
        )
        _add_rows(like, rows, coming, factors, sums, offsets, steps, first, whole, codes_bytes)
        _last_columns(like, rows, factors, sums, whole, end)


def finish(
    like: np.ndarray, sums: np.ndarray, offsets: np.ndarray, d: int, first: int, last: int, out: np.ndarray
) -> None:
    """out[first:last] += what `sum_rows` left in those columns; a kernel's helper."""
    raise NotImplementedError("called from compiled code only")


@overload(finish, strict=False)
def _finish(like: Any, sums: Any, offsets: Any, d: Any, first: Any, last: Any, out: Any) -> Any:
    def in_order(like, sums, offsets, d, first, last, out):  # type: ignore[no-untyped-def]
        for j in range(first, min(last, d)):
            out[j] += sums[j]

    def from_lanes(like, sums, offsets, d, first, last, out):  # type: ignore[no-untyped-def]
        for j in range(first, min(last, d)):
            group, column = j & -GROUP, j & (GROUP - 1)
            block, at = column // BLOCK, column % BLOCK
            place = group + (at % 2) * 64 + block * LANES + at // 2
            out[j] += sums[place] - np.float32(INT4_OFFSET) * offsets[j // BLOCK]

    return in_order if type_like(like).in_order else from_lanes


def new_steps(d: int) -> np.ndarray:
    """A worker's own buffer for `sum_rows`."""
    return np.zeros(8 * (padded(d) // BLOCK), np.float32)


def new_sums(rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Buffers for `rows` results of `sum_rows`: f32 [rows, P] and [rows, P / 32]."""
    return np.zeros((rows, padded(d)), np.float32), np.zeros((rows, padded(d) // BLOCK), np.float32)
