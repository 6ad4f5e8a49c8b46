"""A type of rows that nobody has written an object for is refused wherever rows are read, made, sized or packed."""

import numpy as np
import pytest
from matrix_cases import DTYPES, random_matrix
from numba import typeof, types

from cpu_kernels.blocks import dequantize, quantize
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import LAYOUTS
from cpu_kernels.inputs import new_inputs, one_input
from cpu_kernels.lanes import widen_ref
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import prepare
from cpu_kernels.row_types import ROW_TYPES, row_type, type_like

SIZES = {"f32": (32, 1), "bf16": (16, 1), "f16": (16, 1), "int8": (8, 128), "int4": (4, 128)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_tells_the_type_of_its_rows(dtype):
    matrix = random_matrix(2, 33, dtype)
    kind = matrix.kind
    assert kind is ROW_TYPES[dtype] is type_like(typeof(matrix.rows)) is row_type(matrix.rows.dtype)
    assert (kind.bits, kind.group) == SIZES[dtype] and matrix.dtype == dtype
    assert kind.has_tail is (kind.group == 1) is not kind.layout.in_blocks


@pytest.mark.parametrize("dtype", [bool, np.uint32, np.int64, np.float64, np.float16])
def test_another_array_is_no_row_of_any_type(dtype):
    """Among them one of one byte: the last `else` used to take such rows for int4."""
    with pytest.raises(ValueError, match=f"got an array of {np.dtype(dtype)}"):
        row_type(np.dtype(dtype))
    with pytest.raises(ValueError, match="rows of bf16, f16, f32, int8, int4, got an array of"):
        Matrix(np.zeros((2, 136), dtype), 33)
    with pytest.raises(ValueError, match="rows in blocks are arrays of"):
        dequantize(np.zeros((2, 136), dtype), 33)
    with pytest.raises(TypeError, match="floats are arrays of"):
        widen_ref(np.zeros((2, 136), dtype))


@kernel
def prepared(like, inputs):
    prepare(like, one_input(inputs, 0), 3)


def test_a_kernel_is_not_compiled_for_rows_of_an_unknown_type():
    with pytest.raises(ValueError, match="got an array of bool"):
        prepared(np.zeros((1, 128), bool), new_inputs(1, 3))
    with pytest.raises(TypeError, match="is not an array that says how rows are stored"):
        type_like(types.int64)


def test_a_name_that_is_none():
    for use in (lambda: LAYOUTS["int3"], lambda: quantize(np.zeros((1, 3), np.float32), "int3")):
        with pytest.raises(KeyError, match="int3"):
            use()
