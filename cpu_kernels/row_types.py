"""The types of rows that there are, by name and by the type of their array; another one is refused, not taken for one.

float32 f32    uint16 bf16    int16 f16    int8 blocks of int8    uint8 blocks of int4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import as_dtype

from cpu_kernels.block_rows import Int4Rows, Int8Rows
from cpu_kernels.blocks import FORMATS
from cpu_kernels.contract import LAYOUTS, DType
from cpu_kernels.float_rows import FloatRows
from cpu_kernels.lanes import F32, I32, I64, Code
from cpu_kernels.row_type import RowType

INT8 = Int8Rows(LAYOUTS["int8"], FORMATS["int8"].array)
ROW_TYPES: dict[DType, RowType] = {
    "bf16": FloatRows(LAYOUTS["bf16"], np.dtype(np.uint16)),
    "f16": FloatRows(LAYOUTS["f16"], np.dtype(np.int16)),
    "f32": FloatRows(LAYOUTS["f32"], np.dtype(np.float32)),
    "int8": INT8,
    "int4": Int4Rows(LAYOUTS["int4"], FORMATS["int4"].array),
}
_BY_ARRAY = {kind.array: kind for kind in ROW_TYPES.values()}


def row_type(array: np.dtype) -> RowType:
    """The type of rows in arrays of such elements. Raises `ValueError` where there is none."""
    if array not in _BY_ARRAY:
        raise ValueError(f"a matrix is rows of {', '.join(ROW_TYPES)}, got an array of {array}")
    return _BY_ARRAY[array]


def type_like(like: Any) -> RowType:
    """As `row_type`, of the Numba type of an array. Raises `TypeError`."""
    if not isinstance(like, types.Array):
        raise TypeError(f"{like} is not an array that says how rows are stored")
    return row_type(as_dtype(like.dtype))


def number_of(what: Callable[[RowType], int]) -> Any:
    """A compiled function of `like` that gives a number of its row type."""

    @intrinsic
    def number(typing_context: Any, like: Any) -> Any:
        value = int(what(type_like(like)))
        return types.int64(like), lambda context, builder, signature, args: I64(value)

    return number


columns_unit = number_of(lambda kind: kind.columns_unit)
row_bits = number_of(lambda kind: kind.bits)
row_group = number_of(lambda kind: kind.group)
group_bytes = number_of(lambda kind: kind.layout.row_bytes(kind.group))
has_tail = number_of(lambda kind: kind.has_tail)
in_blocks = number_of(lambda kind: kind.layout.in_blocks)


@intrinsic
def weight_of(typing_context: Any, like: Any, row: Any, column: Any) -> Any:
    """The weight at `column` of the row of floats at address `row`, as f32; 0 for rows in blocks."""
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not kind.has_tail:
            return F32(0.0)
        at = builder.add(args[1], builder.mul(args[2], I64(kind.array.itemsize)))
        wide = Code(context, builder).widened(at, like.dtype, 1)
        return builder.extract_element(wide, I32(0))

    return types.float32(like, types.int64, types.int64), generate
