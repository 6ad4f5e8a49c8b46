"""Widened rows against their reference: every type, awkward widths, any number of workers."""

import numpy as np
import pytest
import torch

from cpu_kernels.matrix import Matrix
from cpu_kernels.widen import widen, widen_ref
from cpu_kernels.worker_pool import WorkerPool

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def make(rows, columns, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    return Matrix.of(weight.to(TYPES[dtype])) if dtype in TYPES else Matrix.of(weight, dtype)


@pytest.mark.parametrize("dtype", [*TYPES, "int8", "int4"])
def test_matches_reference(dtype):
    for rows, columns in ((1, 1), (3, 17), (70, 384), (5, 4095)):
        matrix, pool = make(rows, columns, dtype), WorkerPool(1)
        for chosen in (slice(None), slice(0, 2), slice(rows - 1, rows)):
            assert (widen(matrix, chosen, pool) == widen_ref(matrix, chosen, None)).all()


def test_the_number_of_workers_changes_nothing():
    matrix, pool = make(900, 1024, "bf16"), WorkerPool(3)
    assert pool.workers_for(900 * 1024 * 4) == 3
    assert np.array_equal(widen(matrix, slice(None), pool), widen_ref(matrix, slice(None), None))
    pool.close()
