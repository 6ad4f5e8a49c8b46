"""GEMM against its reference: awkward shapes, every stored type, odd numbers of tokens, biases, any threads; and that
no element depends on what is computed beside it."""

import numpy as np
import pytest
import torch
from matrix_cases import DTYPES, SHAPES, product_bound, random_input, random_matrix, stored

from cpu_kernels.contract import PRECISIONS
from cpu_kernels.gemm import LEAST, GemmScratch, gemm, gemm_ref, shares_of
from cpu_kernels.tile_unit import ROWS
from cpu_kernels.tiles import TOKENS
from cpu_kernels.worker_pool import WorkerPool

NO_BIAS = np.empty(0, np.float32)


def run(matrix, x, bias=NO_BIAS, threads=1, scratch=None, precision="precise"):
    out, pool = np.full((len(x), matrix.shape[0]), np.nan, np.float32), WorkerPool(threads)
    gemm(matrix, x, bias, out, pool, scratch or GemmScratch(threads, precision))
    pool.close()
    return out


def largest_of_blocks(v):
    """Each element's block's largest magnitude, for [n, d]."""
    blocks = np.abs(np.pad(v, ((0, 0), (0, -v.shape[1] % 32)))).reshape(len(v), -1, 32)
    return np.repeat(blocks.max(-1), 32, axis=1)[:, : v.shape[1]]


def bound_of(matrix, x, precision):
    """Of floats that are rounded: half of 1 / 8,191 of its block's largest each of weights and tokens, and f32's."""
    if precision == "precise":
        return 1e-6 * np.abs(x) @ np.abs(matrix.widen().numpy()).T
    if matrix.kind.layout.in_blocks:
        return product_bound(matrix, x)
    w = matrix.widen().numpy()
    half = 0.51 / 8191
    rounded = largest_of_blocks(x) @ np.abs(w).T + np.abs(x) @ largest_of_blocks(w).T
    return half * rounded + half**2 * largest_of_blocks(x) @ largest_of_blocks(w).T + product_bound(matrix, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matches_reference(precision, rows, width, dtype):
    matrix, every, scratch = random_matrix(rows, width, dtype), random_input(40, width), GemmScratch(1, precision)
    for tokens in (40, 1, 3, 6, 11):
        x = every[:tokens]
        for bias in (NO_BIAS, random_input(1, rows)[0]):
            truth = np.full((tokens, rows), np.nan, np.float32)
            gemm_ref(matrix, x, bias, truth)
            found = run(matrix, x, bias, scratch=scratch)
            # Adding the bias rounds once more.
            assert (np.abs(found - truth) <= bound_of(matrix, x, precision) + 1e-6 * np.abs(truth)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_are_exact_where_the_input_fits_16_bits(dtype):
    """Whole numbers of which each block's largest is 32767; powers of two as scales; sums below 2^24 have no error."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-2, 3, (37, 300)).astype(np.float32)
    weight[:, ::32] = 7  # the largest of a block decides its scale
    x = rng.integers(-1000, 1001, (9, 300)).astype(np.float32)
    x[:, 5::32] = 32767
    assert (run(stored(torch.from_numpy(weight), dtype), x, precision="fast") == x @ weight.T).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_sums_of_a_block_fit_their_integers(dtype):
    weight = torch.tensor([[1.0, -1.0] * 64, [-1.0] * 128])
    x = np.full((6, 128), 3.0, np.float32)
    x[1::2] *= -1
    assert np.allclose(run(stored(weight, dtype), x, precision="fast"), x @ weight.numpy().T, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_for_any_threads_and_alone_or_among_others(precision, dtype):
    matrix, x, bias = random_matrix(301, 333, dtype), random_input(20, 333), random_input(1, 301)[0]
    truth = run(matrix, x, bias, precision=precision)
    assert (run(matrix, x, bias, 3, precision=precision) == truth).all()
    for some in (slice(0, 1), slice(5, 9), slice(7, 20)):
        assert (run(matrix, x[some], bias, precision=precision) == truth[some]).all()


@pytest.mark.parametrize("of_tile", [TOKENS, ROWS])
@pytest.mark.parametrize("workers", [1, 2, 3, 14, 64])
def test_work_is_shared_by_all_workers(workers, of_tile):
    for rows in (1, 32, 384, 4096, 11008):
        for tokens in (1, 6, 64, 512):
            unit, parts = shares_of(rows, tokens, of_tile, workers, LEAST)
            pieces = -(-rows // unit) * parts
            assert unit in (32, 64, 128) and 1 <= parts <= max(1, tokens // 3)
            assert pieces >= min(workers, 6) or rows * tokens < 384 * 64
            assert parts == 1 or -(-rows // unit) < 4 * workers  # weights are packed once where there are many


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_and_weights_of_zeros_and_tiny_ones(precision):
    weight, x = torch.zeros(3, 64), np.zeros((7, 64), np.float32)
    weight[1], x[2] = 1e-38, 3e-39
    weight[2, 5], x[3, 5] = 2.0, 1.0
    found = run(stored(weight, "f32"), x, precision=precision)
    assert found[3, 2] == pytest.approx(2, rel=1e-6) and np.isfinite(found).all()
    found[3, 2] = 0
    assert np.abs(found).max() < 1e-30


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
