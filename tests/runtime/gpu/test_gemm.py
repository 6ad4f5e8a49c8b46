"""Products of many tokens, of every kind of weights and through a scratch that takes pieces only."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix

from gpu_kernels.dense import split_ref, widen_ref
from hybrid.runtime.gpu.gemm import GpuGemm, Projection, pieces, scratch_floats, some_rows


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Without a GPU, references in the place of kernels that have tests of their own."""
    if DEVICE == "cpu":
        monkeypatch.setattr("hybrid.runtime.gpu.gemm.split", split_ref)
        monkeypatch.setattr("hybrid.runtime.gpu.gemm.widen", widen_ref)


def gemm(tokens, widest, rows):
    return GpuGemm(torch.full((scratch_floats(tokens, widest, rows),), torch.nan, device=DEVICE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "m", "k"), [(1, 1, 1), (3, 300, 129), (17, 129, 300), (5, 2500, 40)])
@pytest.mark.parametrize("rows", [1, 10_000])
def test_project(rows, tokens, m, k, kind):
    weights, x = [random_matrix(m, k, kind, seed) for seed in (1, 2)], random_input(tokens, k)
    bias, whole = random_input(1, m)[0], torch.zeros(tokens, 2 * m, device=DEVICE)
    first, second = whole[:, :m], whole[:, m:]
    gemm(tokens, max(m, k), rows).project(x, Projection(weights[0], bias, first), Projection(weights[1], None, second))
    wide = [weight.widen().double().T for weight in weights]
    assert_close(first, x.double() @ wide[0] + bias, 2e-6)
    assert_close(second, x.double() @ wide[1], 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "m", "k"), [(1, 1, 1), (3, 300, 129), (17, 129, 300), (5, 40, 2500)])
@pytest.mark.parametrize("rows", [1, 10_000])
def test_add_product(rows, tokens, m, k, kind):
    weight, x, out = random_matrix(k, m, kind), random_input(tokens, k), random_input(tokens, m, 3)
    expected = out.double() + x.double() @ weight.widen().double()
    gemm(tokens, max(m, k), rows).add_product(x, weight, out)
    assert_close(out, expected, 2e-6)


def test_bf16_weights_are_not_met_by_rounded_inputs():
    """Inputs that bf16 would round to 1, less 1: what is left is all that there is."""
    weight = random_matrix(2, 2, "bf16")
    weight.rows[:] = torch.tensor([[1.0, -1.0], [0.0, 1.0]], device=DEVICE)
    out = torch.empty(1, 2, device=DEVICE)
    gemm(1, 2, 1).project(torch.tensor([[1 + 2.0**-20, 1.0]], device=DEVICE), Projection(weight, None, out))
    assert out.tolist() == [[2.0**-20, 1.0]]


@pytest.mark.parametrize(
    ("count", "most"), [(0, 5), (1, 1), (5, 5), (6, 5), (129, 64), (2500, 1000), (300, 65), (7, 1)]
)
def test_pieces(count, most):
    found = pieces(count, most)
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(count))
    sizes = [piece.stop - piece.start for piece in found]
    assert all(1 <= size <= most for size in sizes)
    assert most < 64 or all(size % 64 == 0 for size in sizes[:-1])


def test_some_rows_are_a_view():
    matrix = random_matrix(5, 33, "int4")
    assert some_rows(matrix, slice(2, 4)).rows.data_ptr() == matrix.rows[2].data_ptr()
