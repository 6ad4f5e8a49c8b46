"""Widened columns of rows against their reference: every type, awkward widths, parts that begin at a group."""

import numpy as np
import pytest
from matrix_cases import DTYPES, SHAPES, random_matrix

from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel
from cpu_kernels.row_sum import column_bytes
from cpu_kernels.widen import widen_columns


@kernel
def widen(like, row, d, first, last, out):
    widen_columns(like, row, first, last, column_bytes(like, padded(d)), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype):
    for rows, columns in SHAPES:
        matrix = random_matrix(rows, columns, dtype)
        truth, row = matrix.widen().numpy()[-1], matrix.rows.ctypes.data + (rows - 1) * matrix.row_bytes
        for first in range(0, columns, 128):
            for last in {columns, min(first + 128, columns), first + 1}:
                out = np.full(padded(last - first), np.nan, np.float32)
                widen(matrix.like, row, columns, first, last, out)
                assert (out[: last - first] == truth[first:last]).all()
