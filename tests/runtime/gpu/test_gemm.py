"""Products of many tokens, of every kind of weights and through a scratch that takes pieces only."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix

from gpu_kernels.dense import hidden_terms_ref, sum_products_ref, widen_ref
from gpu_kernels.row_gemm import split_rows_ref
from gpu_kernels.sparse_ffn import DeviceFFNView
from hybrid.runtime.gpu.gemm import GpuGemm, pieces, some_rows
from placement.workspace import GemmSizes

REFERENCES = {
    "split_rows": split_rows_ref, "widen": widen_ref, "sum_products": sum_products_ref, "hidden_terms": hidden_terms_ref
}  # fmt: skip
# Of the largest value: two terms keep 18 bits of a token; f16 keeps 11 of a weight in blocks.
TOLERANCES = {"bf16": 8e-6, "f16": 2e-6, "f32": 2e-6, "int8": 1e-3, "int4": 1e-3}


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Without a GPU, references in the place of kernels that have tests of their own."""
    if DEVICE == "cpu":
        for name, reference in REFERENCES.items():
            monkeypatch.setattr(f"hybrid.runtime.gpu.gemm.{name}", reference)


def gemm(tokens, width, columns, kind, precise):
    sizes = GemmSizes(tokens, width, columns, kind.startswith("int"))
    return GpuGemm(torch.full((sum(sizes.parts),), torch.nan, device=DEVICE), sizes, precise)


def tolerance(kind, precise):
    return 2e-6 if precise else TOLERANCES[kind]


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "m", "k"), [(1, 1, 1), (3, 300, 129), (17, 129, 300), (5, 2500, 40)])
@pytest.mark.parametrize("columns", [3, 2000])
def test_project(columns, tokens, m, k, kind, precise):
    weight, x, bias = random_matrix(m, k, kind), random_input(tokens, k), random_input(1, m)[0]
    whole = random_input(tokens, 2 * m, 3)
    set_to, added_to = whole[:, :m], whole[:, m:]
    expected = x.double() @ weight.widen().double().T
    sums = added_to.double() + expected
    made = gemm(tokens, k, columns, kind, precise)
    made.project(x, weight, bias, set_to)
    made.project(x, weight, None, added_to, add=True)
    assert_close(set_to, expected + bias, tolerance(kind, precise))
    assert_close(added_to, sums, tolerance(kind, precise))


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("tokens", "neurons", "d", "columns"), [(1, 1, 1, 1), (3, 300, 129, 70), (7, 129, 300, 1000)])
def test_add_ffn(tokens, neurons, d, columns, gated, kind, precise):
    gate, up, down = (random_matrix(neurons, d, kind, seed) for seed in (1, 2, 3))
    biases = (random_input(1, neurons, 4)[0] if gated else None, random_input(1, neurons, 5)[0])
    view = DeviceFFNView(gate if gated else None, up, down, *biases, "relu")
    x, out = random_input(tokens, d), random_input(tokens, d, 3)
    gates, ups, downs = (matrix.widen().double() for matrix in (gate, up, down))
    hidden = x.double() @ ups.T + biases[1]
    hidden = (x.double() @ gates.T + biases[0]).relu() * hidden if gated else hidden.relu()
    expected = out.double() + hidden @ downs
    gemm(tokens, d, columns, kind, precise).add_ffn(x, view, out)
    assert_close(out, expected, 2 * tolerance(kind, precise))


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_16_bit_weights_are_not_met_by_rounded_inputs(kind, precise):
    """Inputs that 16 bits would round to 1, less 1: what is left is all that there is."""
    weight, rest = random_matrix(2, 2, kind), 2.0**-20 if precise else 2.0**-15 * (1 + 2.0**-8)
    weight.rows[:] = torch.tensor([[1.0, -1.0], [0.0, 1.0]], device=DEVICE)
    out = torch.empty(1, 2, device=DEVICE)
    gemm(1, 2, 1, kind, precise).project(torch.tensor([[1 + rest, 1.0]], device=DEVICE), weight, None, out)
    assert out[0, 1] == 1 and abs(out[0, 0] / rest - 1) < (1e-6 if precise else 0.01)


def test_sizes_beyond_f16_go_through_f16_weights():
    weight, x, out = random_matrix(3, 40, "int8"), random_input(2, 40), torch.empty(2, 3, device=DEVICE)
    x[0] *= 1e20
    gemm(2, 40, 3, "int8", False).project(x, weight, None, out)
    expected = x.double() @ weight.widen().double().T
    for row, right in zip(out, expected, strict=True):
        assert_close(row, right, 1e-3)


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
