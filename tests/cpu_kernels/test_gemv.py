"""GEMV against its reference: awkward shapes, every stored type, 1 to 8 tokens, biases, any number of workers."""

import numpy as np
import pytest
import torch
from matrix_cases import DTYPES, SHAPES, THREADS, product_bound, random_input, random_matrix, stored

from cpu_kernels.gemv import gemv, gemv_ref
from cpu_kernels.lanes import kernel_view, widen_ref
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool

NO_BIAS = np.empty(0, np.float32)


def run(matrix, x, bias=NO_BIAS, pool=None):
    out = np.full((len(x), matrix.shape[0]), np.nan, np.float32)
    gemv(matrix, x, bias, out, pool or WorkerPool(1))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_matches_reference(rows, width, dtype):
    matrix, every = random_matrix(rows, width, dtype), random_input(8, width)
    for tokens in (1, 2, 5, 8):
        x = every[:tokens]
        for bias in (NO_BIAS, random_input(1, rows)[0]):
            truth = np.full((tokens, rows), np.nan, np.float32)
            gemv_ref(matrix, x, bias, truth, None)
            # Adding the bias rounds once more.
            assert (np.abs(run(matrix, x, bias) - truth) <= product_bound(matrix, x) + 1e-6 * np.abs(truth)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_round_the_input_to_16_bits_and_lose_nothing_else(dtype):
    """Errors of 1.5e-5 / sqrt(3) of a block's largest, some 2.3 deviations, leave 2e-5 of the answer's."""
    matrix, x = random_matrix(301, 4095, dtype), random_input(1, 4095)
    truth = np.empty((1, 301), np.float32)
    gemv_ref(matrix, x, NO_BIAS, truth, None)
    assert np.linalg.norm(run(matrix, x) - truth) < 4e-5 * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_are_exact_where_the_input_fits_16_bits(dtype):
    """Whole numbers of which each block's largest is 32767; powers of two as scales; sums below 2^24 have no error."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-2, 3, (37, 300)).astype(np.float32)
    weight[:, ::32] = 7  # the largest of a block decides its scale
    x = rng.integers(-1000, 1001, (1, 300)).astype(np.float32)
    x[0, 5::32] = 32767
    assert (run(stored(torch.from_numpy(weight), dtype), x) == x @ weight.T).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_alone_or_among_others(dtype, monkeypatch):
    monkeypatch.setattr("cpu_kernels.worker_pool.BYTES_PER_WORKER", 1)
    matrix, x, bias = random_matrix(1001, 333, dtype), random_input(8, 333), random_input(1, 1001)[0]
    truth = run(matrix, x, bias)
    for t in range(8):
        assert (run(matrix, x[t : t + 1], bias) == truth[t]).all()
    for threads in THREADS[1:]:
        pool = WorkerPool(threads)
        assert pool.workers_for(matrix.nbytes) == threads
        assert (run(matrix, x, bias, pool) == truth).all()
        pool.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widening_is_exact_for_every_finite_value(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = (
        bits.view(dtype) if dtype != torch.float32 else torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    )
    weight = weight[weight.isfinite()][:, None].contiguous()
    out = run(Matrix.of(weight), np.ones((1, 1), np.float32))[0]
    assert (out == weight[:, 0].float().numpy()).all()
    assert (widen_ref(kernel_view(weight))[:, 0] == out).all()


def test_misfits_are_refused():
    pool, matrix = WorkerPool(1), random_matrix(2, 3, "f32")
    x, out = np.zeros((1, 3), np.float32), np.empty((1, 2), np.float32)
    for bad in (np.zeros((1, 4), np.float32), np.zeros(3, np.float32)[None, :2]):
        with pytest.raises(ValueError, match="shapes do not fit"):
            gemv(matrix, bad, NO_BIAS, out, pool)
    with pytest.raises(ValueError, match="shapes do not fit"):
        gemv(matrix, x, np.zeros(3, np.float32), out, pool)
    with pytest.raises(ValueError, match="f32"):
        gemv(matrix, x.astype(np.float64), NO_BIAS, out, pool)
    for tokens in (0, 33):
        with pytest.raises(ValueError, match=f"1 to 32 tokens, got {tokens}"):
            run(matrix, np.zeros((tokens, 3), np.float32))
