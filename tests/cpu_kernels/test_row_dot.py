"""Dot products of four rows: every type and length against f64, one sum in any company, nothing beyond a row."""

import numpy as np
import pytest
import torch
from matrix_cases import DTYPES, in_f64, product_bound, random_input, random_matrix

from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel
from cpu_kernels.inputs import new_inputs, one_input, round_input
from cpu_kernels.low_rank import pad_codes
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import dot_codes, dot_four, prepare

LENGTHS = [1, 17, 31, 32, 33, 127, 128, 129, 384, 1023, 4095]


@kernel
def dots(like, rows, inputs, d):
    prepare(like, one_input(inputs, 0), d)
    at = rows[0], rows[1], rows[2], rows[3]
    return dot_four(like, at, (at[1], at[2], at[3], at[0]), one_input(inputs, 0), d)


@kernel
def code_dots(like, rows, inputs, d):
    round_input(one_input(inputs, 0), d)
    at = rows[0], rows[1], rows[2], rows[3]
    return dot_codes(like, at, at, one_input(inputs, 0), d)


def product(matrix, x, ids):
    """The rows `ids`, four of them, times x [1, d]."""
    inputs = new_inputs(1, matrix.columns)
    inputs[0][:] = x
    rows = matrix.rows.ctypes.data + np.array(ids, np.int64) * matrix.row_bytes
    return np.array(dots(matrix.rows, rows, inputs, matrix.columns), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", LENGTHS)
def test_four_rows_match_f64(d, dtype):
    matrix, x = random_matrix(9, d, dtype), random_input(1, d)
    truth = (x.astype(np.float64) @ in_f64(matrix).T)[0]
    ours = product(matrix, x, [7, 0, 3, 8])
    assert (np.abs(ours - truth[[7, 0, 3, 8]]) <= product_bound(matrix, x)[0, [7, 0, 3, 8]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_sum_has_the_same_bits_in_any_company(dtype):
    matrix, x = random_matrix(4, 1023, dtype), random_input(1, 1023)
    together = product(matrix, x, [0, 1, 2, 3])
    assert (product(matrix, x, [3, 1, 0, 2]) == together[[3, 1, 0, 2]]).all()
    for row in range(4):
        assert (product(matrix, x, [row] * 4) == together[row]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [17, 129])
def test_nothing_beyond_a_row_is_added(d, dtype):
    """Rows before and after hold NaN."""
    inner, x = random_matrix(1, d, dtype), random_input(1, d)
    poison = np.full(inner.rows.shape, 0xFF, np.uint8) if inner.rows.itemsize == 1 else np.full(inner.rows.shape, -1)
    if inner.dtype == "f32":
        poison = np.full(inner.rows.shape, np.nan)
    poison = poison.astype(inner.rows.dtype) if inner.rows.itemsize > 1 else poison.view(inner.rows.dtype)
    outer = Matrix(np.concatenate([poison, inner.rows, poison]), d)
    assert (product(outer, x, [1] * 4) == product(inner, x, [0] * 4)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_input_of_zeros_and_tiny_and_huge_blocks(dtype):
    matrix = random_matrix(4, 128, dtype)
    assert (product(matrix, np.zeros((1, 128), np.float32), [0, 1, 2, 3]) == 0).all()
    x = random_input(1, 128)
    x[0, :32] *= 1e-20
    x[0, 32:64] *= 1e20
    x[0, 64:96] = 0
    truth = (x.astype(np.float64) @ in_f64(matrix).T)[0]
    assert (np.abs(product(matrix, x, [0, 1, 2, 3]) - truth) <= product_bound(matrix, x)[0]).all()


@pytest.mark.parametrize("d", LENGTHS)
def test_codes_without_scales(d):
    codes = torch.randint(-127, 128, (4, d), generator=torch.Generator().manual_seed(d), dtype=torch.int8).numpy()
    wide, x, inputs = pad_codes(codes), random_input(1, d), new_inputs(1, d)
    inputs[0][:] = x
    rows = wide.ctypes.data + np.arange(4, dtype=np.int64) * padded(d)
    ours = np.array(code_dots(wide, rows, inputs, d), np.float32)
    largest = np.abs(np.pad(x, ((0, 0), (0, -d % 32)))).reshape(-1, 32).max(-1).repeat(32)[:d]
    truth = codes.astype(np.float64) @ x[0].astype(np.float64)
    assert (np.abs(ours - truth) <= 2e-5 * np.abs(codes).astype(np.float64) @ largest).all()


@pytest.mark.parametrize("d", [1, 33, 300])
def test_the_rounded_input(d):
    """Codes within half a step of x over its block's scale, zeros beyond d, and the sums that int4's offset needs."""
    inputs = new_inputs(1, d)
    inputs[1][:] = 99  # what an earlier token left
    x = inputs[0][0]
    x[:] = random_input(1, d)[0]
    round_input(tuple(part[0] for part in inputs), d)
    codes, scales, sums = inputs[1][0].astype(np.float64), inputs[2][0].astype(np.float64), inputs[4][0]
    wide = np.pad(x, (0, padded(d) - d)).astype(np.float64)
    assert (np.abs(codes * scales.repeat(32) - wide) <= 0.505 * scales.repeat(32)).all()
    assert (codes[d:] == 0).all() and np.abs(codes).max() == 32767
    np.testing.assert_allclose(sums, 8 * scales * codes.reshape(-1, 32).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(inputs[3][0], inputs[2][0] * np.resize([1, 1 / 16, 1 / 256, 1], len(scales)))
