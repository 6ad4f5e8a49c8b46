"""GEMM of many rows on tensor cores: awkward shapes, values of any size, the same sums for 8, 16 and 32, refusals."""

import pytest
import torch
from gpu_cases import DEVICE, assert_close, random_input, random_matrix

from gpu_kernels.gemv import gemv, gemv_ref
from gpu_kernels.row_gemm import GEMM_KINDS, STEP, TERMS, TILE, gemm_floats, gemm_parts, split_rows, takes_rows

every_kind = pytest.mark.parametrize("kind", GEMM_KINDS)


def scratch_for(tokens, matrix):
    """Of what no sum can hide."""
    return torch.full((gemm_floats(tokens, *matrix.shape),), torch.nan, device=DEVICE)


def check(matrix, x, bias=None, **options):
    """`gemv` with scratch against its reference, into an output that already holds something."""
    out = random_input(len(x), matrix.shape[0], seed=9)
    expected = out.clone()
    gemv(matrix, x, bias, out, scratch=scratch_for(len(x), matrix), **options)
    gemv_ref(matrix, x, bias, expected, **options)
    assert_close(out, expected, 2e-6)
    return out


@every_kind
@pytest.mark.parametrize(("n", "d", "tokens"), [(1, 17, 8), (TILE + 1, 300, 16), (2 * TILE, STEP * 4, 32)])
def test_awkward_shapes(kind, n, d, tokens):
    check(random_matrix(n, d, kind), random_input(tokens, d))


@every_kind
@pytest.mark.parametrize("parts", [1, 3])
def test_bias_then_activation_then_adding(kind, parts, monkeypatch):
    monkeypatch.setattr("gpu_kernels.row_gemm.MOST_GEMM_PARTS", parts)
    matrix, x, bias = random_matrix(9, 200, kind), random_input(8, 200), random_input(1, 9, 5)[0]
    check(matrix, x, bias, add=True, activation="silu")


@every_kind
def test_values_of_any_size_keep_their_bits(kind):
    """Rows of x far larger and far smaller than f16 holds, and a row of zeros."""
    sizes = 10.0 ** torch.tensor([-30.0, -10, -3, 0, 3, 6, 20, 30], device=DEVICE)
    x, matrix = random_input(8, 65) * sizes[:, None], random_matrix(5, 65, kind)
    x[3] = 0
    found, expected = torch.empty(8, 5, device=DEVICE), torch.empty(8, 5, device=DEVICE)
    gemv(matrix, x, None, found, scratch=scratch_for(8, matrix))
    gemv_ref(matrix, x, None, expected)
    for row, right in zip(found, expected, strict=True):
        assert_close(row, right, 1e-6)
    assert (found[3] == 0).all()


@every_kind
def test_terms_add_up_to_the_rows(kind):
    """Of f16 but for what is 2^-38 of a row's largest value."""
    x = random_input(8, 130)[:, :129]  # rows of a wider tensor
    x[0, :9] *= 1000
    terms = torch.empty(TERMS, 8, 129, dtype=random_matrix(1, 1, kind).rows.dtype, device=DEVICE)
    scales = torch.empty(8, device=DEVICE)
    split_rows(x, terms, scales)
    off = (terms.double().sum(0) * scales[:, None].double() - x).abs().amax(1)
    assert (off <= x.abs().amax(1) * (0.0 if kind == "bf16" else 2.0**-38)).all()


@every_kind
def test_a_row_has_the_same_sums_among_8_16_and_32(kind):
    matrix, x = random_matrix(9, 300, kind), random_input(32, 300)
    every = check(matrix, x)
    for tokens in (8, 16):
        out = torch.empty(tokens, 9, device=DEVICE)
        gemv(matrix, x[-tokens:], None, out, scratch=scratch_for(tokens, matrix))
        if DEVICE == "cuda":
            assert torch.equal(out, every[-tokens:])
        else:  # numpy's products depend on the shape
            assert_close(out, every[-tokens:], 5e-7)


def test_what_else_there_is_goes_the_other_way():
    """Other kinds and few rows do not touch the scratch."""
    assert not takes_rows("f32", 8) and not takes_rows("int4", 32) and not takes_rows("bf16", 4)
    for kind, tokens in (("bf16", 4), ("f32", 8)):
        matrix, x, out = random_matrix(3, 64, kind), random_input(tokens, 64), torch.empty(tokens, 3, device=DEVICE)
        scratch = torch.full((9999,), 7.0, device=DEVICE)
        gemv(matrix, x, None, out, scratch=scratch)
        assert (scratch == 7).all()


def test_parts_fill_the_gpu():
    assert [gemm_parts(n) for n in (1, 4096, 12288, 32000)] == [4, 4, 2, 1]


def test_too_little_scratch_is_refused():
    matrix, out = random_matrix(4, 64, "bf16"), torch.empty(8, 4, device=DEVICE)
    with pytest.raises(ValueError, match=f"wants {gemm_floats(8, 4, 64)} f32 of scratch"):
        gemv(matrix, random_input(8, 64), None, out, scratch=scratch_for(8, matrix)[1:])
