"""`Matrix`: widening against NumPy for every stored type, some rows at a time, read-only maps, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
from matrix_cases import DTYPES, SHAPES, random_matrix, stored

from cpu_kernels.blocks import dequantize, quantize
from cpu_kernels.contract import LAYOUTS
from cpu_kernels.lanes import widen_ref
from cpu_kernels.matrix import Matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_widen_equals_the_reference(n, d, dtype):
    matrix = random_matrix(n, d, dtype)
    truth = dequantize(matrix.rows, d) if dtype in ("int8", "int4") else widen_ref(matrix.rows)
    assert (matrix.widen().numpy() == truth).all()
    some = np.arange(n - 1, -1, -2)
    assert (matrix.widen(some).numpy() == truth[some]).all()
    assert (matrix.widen(slice(n // 3, n // 2 + 1)).numpy() == truth[n // 3 : n // 2 + 1]).all()
    assert matrix.dtype == dtype and matrix.shape == (n, d)
    assert matrix.row_bytes * n == matrix.nbytes == matrix.rows.nbytes


@pytest.mark.parametrize(("dtype", "width", "nbytes"), [("bf16", 33, 66), ("int8", 136, 136), ("int4", 72, 72)])
def test_sizes_of_a_row(dtype, width, nbytes):
    assert LAYOUTS[dtype].elements(33) == width and random_matrix(2, 33, dtype).row_bytes == nbytes


def test_floats_share_the_tensors_memory():
    weight = torch.randn(3, 5).bfloat16()
    matrix = Matrix.of(weight)
    weight[1, 2] = 7
    assert matrix.widen()[1, 2] == 7
    assert (Matrix.of(weight.T).widen() == weight.T.float()).all()


def test_blocks_of_a_tensor_of_any_float_type():
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix = Matrix.of(weight, "int8")
    assert (matrix.rows == quantize(weight.float().numpy(), "int8")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_read_only_map_is_widened_without_a_warning(dtype, tmp_path):
    matrix = random_matrix(5, 33, dtype)
    matrix.rows.tofile(tmp_path / "rows")
    mapped = Matrix(np.memmap(tmp_path / "rows", matrix.rows.dtype, "r", shape=matrix.rows.shape), 33)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (mapped.widen() == matrix.widen()).all()
        assert (mapped.widen(np.array([3, 1])) == matrix.widen()[[3, 1]]).all()
    # Read-only arrays are another type, for which kernels would be compiled once more.
    assert mapped.like.flags.writeable and mapped.like.dtype == matrix.rows.dtype


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="rows of bf16, f16, f32, int8, int4, got an array of float64"):
        Matrix(np.zeros((2, 3)), 3)
    with pytest.raises(ValueError, match="C-contiguous"):
        Matrix(np.zeros((3, 2), np.float32).T, 3)
    with pytest.raises(ValueError, match="C-contiguous"):
        Matrix(np.zeros(3, np.float32), 3)
    for dtype in ("int8", "int4"):
        rows = stored(torch.zeros(2, 33), dtype).rows
        message = f"{dtype} rows of 129 weights are {LAYOUTS[dtype].row_bytes(129)} wide, got {rows.shape[1]}"
        with pytest.raises(ValueError, match=message):
            Matrix(rows, 129)
