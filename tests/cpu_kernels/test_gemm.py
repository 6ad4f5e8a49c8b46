"""GEMM against its reference: awkward shapes, every stored type, odd numbers of tokens, biases, any threads; and that
no element depends on what is computed beside it."""

import numpy as np
import pytest
import torch
from matrix_cases import DTYPES, SHAPES, product_bound, random_input, random_matrix, stored

from cpu_kernels.gemm import GemmScratch, gemm, gemm_ref
from cpu_kernels.worker_pool import WorkerPool

NO_BIAS = np.empty(0, np.float32)


def run(matrix, x, bias=NO_BIAS, threads=1, scratch=None):
    out, pool = np.full((len(x), matrix.shape[0]), np.nan, np.float32), WorkerPool(threads)
    gemm(matrix, x, bias, out, pool, scratch or GemmScratch(threads))
    pool.close()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_matches_reference(rows, width, dtype):
    matrix, every, scratch = random_matrix(rows, width, dtype), random_input(40, width), GemmScratch(1)
    for tokens in (40, 1, 3, 6, 11):
        x = every[:tokens]
        for bias in (NO_BIAS, random_input(1, rows)[0]):
            truth = np.full((tokens, rows), np.nan, np.float32)
            gemm_ref(matrix, x, bias, truth)
            found = run(matrix, x, bias, scratch=scratch)
            # Adding the bias rounds once more.
            assert (np.abs(found - truth) <= product_bound(matrix, x) + 1e-6 * np.abs(truth)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_are_exact_where_the_input_fits_16_bits(dtype):
    """Whole numbers of which each block's largest is 32767; powers of two as scales; sums below 2^24 have no error."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-2, 3, (37, 300)).astype(np.float32)
    weight[:, ::32] = 7  # the largest of a block decides its scale
    x = rng.integers(-1000, 1001, (9, 300)).astype(np.float32)
    x[:, 5::32] = 32767
    assert (run(stored(torch.from_numpy(weight), dtype), x) == x @ weight.T).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_largest_sums_of_a_block_fit_their_integers(dtype):
    weight = torch.tensor([[1.0, -1.0] * 64, [-1.0] * 128])
    x = np.full((6, 128), 3.0, np.float32)
    x[1::2] *= -1
    assert np.allclose(run(stored(weight, dtype), x), x @ weight.numpy().T, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_alone_or_among_others(dtype):
    matrix, x, bias = random_matrix(301, 333, dtype), random_input(20, 333), random_input(1, 301)[0]
    truth = run(matrix, x, bias)
    assert (run(matrix, x, bias, threads=3) == truth).all()
    for some in (slice(0, 1), slice(5, 9), slice(7, 20)):
        assert (run(matrix, x[some], bias) == truth[some]).all()


def test_buffers_grow_and_keep_nothing_of_other_calls():
    scratch = GemmScratch(1)
    for rows, width, tokens in ((5, 40, 3), (70, 300, 14), (9, 20, 31), (5, 40, 3)):
        matrix, x = random_matrix(rows, width, "bf16"), random_input(tokens, width)
        assert (run(matrix, x, scratch=scratch) == run(matrix, x)).all()


def test_no_tokens():
    assert run(random_matrix(5, 8, "f32"), np.empty((0, 8), np.float32)).shape == (0, 5)


def test_what_does_not_fit_is_refused():
    matrix, x, pool, scratch = random_matrix(5, 8, "f32"), random_input(2, 8), WorkerPool(1), GemmScratch(1)
    out = np.empty((2, 5), np.float32)
    for x_, bias, out_, said in (
        (x[:, :7], NO_BIAS, out, "do not fit"),
        (x, NO_BIAS[:0].repeat(0), out[:1], "do not fit"),
        (x, np.zeros(4, np.float32), out, "do not fit"),
        (x.astype(np.float64), NO_BIAS, out, "contiguous f32"),
        (np.asfortranarray(x), NO_BIAS, out, "contiguous f32"),
    ):
        with pytest.raises(ValueError, match=said):
            gemm(matrix, x_, bias, out_, pool, scratch)
