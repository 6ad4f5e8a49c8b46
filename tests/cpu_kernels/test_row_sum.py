"""Sums of scaled rows: every type and width against f64, parts of the list, counts that are not whole fours."""

import numpy as np
import pytest
from matrix_cases import DTYPES, in_f64, random_input, random_matrix

from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import BLOCK
from cpu_kernels.row_sum import finish, new_steps, new_sums, sum_rows
from cpu_kernels.row_types import columns_unit


@kernel
def scaled_sum(like, weight, width, ids, scales, count, d, parts, sums, offsets, steps, out):
    """The whole sum, its columns cut into `parts` slices as `parts` workers would."""
    unit = columns_unit(like)
    units = (d + unit - 1) // unit
    begin, none = count - count, (weight, weight, weight, weight)
    for part in range(parts):
        first, last = unit * (units * part // parts), unit * (units * (part + 1) // parts)
        for t in range(scales.shape[0]):
            sums[t, first:last] = 0
            offsets[t, first // BLOCK : last // BLOCK] = 0
            sum_rows(
                like, weight, width, ids, scales[t], begin, count, none, d, first, last, sums[t], offsets[t], steps
            )  # fmt: skip
            finish(like, sums[t], offsets[t], d, first, last, out[t])


def run(matrix, ids, scales, parts=1):
    tokens, d = len(scales), matrix.columns
    sums, offsets = new_sums(tokens, d)
    sums[:], offsets[:] = 55, 66  # what an earlier token left
    out = np.ones((tokens, d), np.float32)
    rows = (matrix.rows, matrix.rows.ctypes.data, matrix.row_bytes, ids.astype(np.int32), scales)
    scaled_sum(*rows, len(ids), d, parts, sums, offsets, new_steps(d), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 17, 33, 128, 129, 384, 1023, 4095])
def test_matches_f64(d, dtype):
    matrix = random_matrix(40, d, dtype)
    wide = in_f64(matrix)
    for count in (0, 1, 2, 3, 4, 5, 31, 70):
        ids, scales = np.arange(count)[::-1] % 40, random_input(2, count, seed=d)
        truth = 1 + scales.astype(np.float64) @ wide[ids]
        # int4 codes are summed with their offset of 8, whose share is then taken off: up to 8 scales, 1.5 each at most.
        size = np.abs(scales).astype(np.float64) @ (np.abs(wide[ids]) + (12 if dtype == "int4" else 0))
        assert (np.abs(run(matrix, ids, scales) - truth) <= 1e-6 * size + 1e-6 * np.abs(truth)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_slices_and_alone_or_among_others(dtype):
    matrix, ids, scales = random_matrix(40, 1023, dtype), np.arange(1, 38, 2), random_input(3, 19)
    whole = run(matrix, ids, scales)
    for parts in (2, 3, 7, 40):
        assert (run(matrix, ids, scales, parts) == whole).all()
    for t in range(3):
        assert (run(matrix, ids, scales[t : t + 1]) == whole[t]).all()


def test_a_part_of_the_list_is_its_own_sum():
    matrix, ids, scales = random_matrix(40, 300, "int4"), np.arange(1, 38, 2), random_input(1, 19)
    part = run(matrix, ids[5:12], np.ascontiguousarray(scales[:, 5:12]))
    sums, offsets = new_sums(1, 300)
    out, rows = np.ones((1, 300), np.float32), (matrix.rows, matrix.rows.ctypes.data, matrix.row_bytes)
    part_of_sum(*rows, ids.astype(np.int32), scales, 5, 12, 300, sums, offsets, new_steps(300), out)
    assert (out == part).all()


@kernel
def part_of_sum(like, weight, width, ids, scales, start, stop, d, sums, offsets, steps, out):
    none, first, last = (weight, weight, weight, weight), stop - stop, sums.shape[1]
    sums[:] = 0
    offsets[:] = 0
    sum_rows(like, weight, width, ids, scales[0], start, stop, none, d, first, last, sums[0], offsets[0], steps)
    finish(like, sums[0], offsets[0], d, first, last, out[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_times_one_is_that_row(dtype):
    matrix = random_matrix(5, 300, dtype)
    out = run(matrix, np.array([3]), np.ones((1, 1), np.float32)) - 1
    exact = matrix.widen(np.array([3])).numpy()
    np.testing.assert_allclose(out, exact, rtol=0, atol=3e-6)
    assert padded(300) == 384
