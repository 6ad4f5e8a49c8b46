"""GPU GEMV: every kind of matrix, awkward shapes, batches, bias, activations, adding, strided x, refusals."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix
from matrix_cases import ACTIVATIONS

from gpu_kernels.gemv import Tiling, gemv, gemv_ref

every_kind = pytest.mark.parametrize("kind", KINDS)


def check(matrix, x, bias=None, **options):
    """`gemv` against its reference, into an output that already holds something."""
    out = random_input(len(x), matrix.shape[0], seed=9)
    expected = out.clone()
    gemv(matrix, x, bias, out, **options)
    gemv_ref(matrix, x, bias, expected, **{name: value for name, value in options.items() if name != "tiling"})
    assert_close(out, expected)


@every_kind
@pytest.mark.parametrize(("n", "d", "tokens"), [(1, 17, 1), (17, 129, 2), (5, 300, 8), (9, 1024, 1)])
def test_awkward_shapes(kind, n, d, tokens):
    check(random_matrix(n, d, kind), random_input(tokens, d))


@every_kind
def test_several_steps_of_columns(kind):
    check(random_matrix(7, 700, kind), random_input(1, 700), tiling=Tiling(2, 1, 1))


@every_kind
def test_a_row_of_zeros_but_one_weight(kind):
    """A column that is lost or counted twice shows by itself."""
    matrix = random_matrix(3, 300, kind)
    wide = matrix.widen()
    for column in (0, 31, 32, 127, 128, 255, 299):
        x = torch.zeros(1, 300, device=DEVICE)
        x[0, column] = 1
        out = torch.zeros(1, 3, device=DEVICE)
        gemv(matrix, x, None, out)
        assert_close(out[0], wide[:, column], 1e-6)


def test_bias_then_activation_then_adding():
    matrix, x, bias = random_matrix(17, 129, "bf16"), random_input(2, 129), random_input(1, 17, 5)[0]
    check(matrix, x, bias)
    check(matrix, x, bias, add=True)
    check(matrix, x, bias, add=True, activation="relu2")
    check(matrix, x, None, activation="silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    matrix, x = random_matrix(40, 64, "f32"), 3 * random_input(2, 64)
    check(matrix, x, activation=activation)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_values_of_an_activation_stay_finite():
    matrix = random_matrix(4, 16, "f32")
    for activation in ACTIVATIONS:
        check(matrix, 1e3 * random_input(1, 16), activation=activation)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_token_has_the_same_sums_however_many_there_are(kind):
    matrix, x, bias = random_matrix(9, 300, kind), random_input(32, 300), random_input(1, 9, 5)[0]
    check(matrix, x, bias, add=True, activation="silu")
    every, alone = torch.empty(32, 9, device=DEVICE), torch.empty(1, 9, device=DEVICE)
    gemv(matrix, x, bias, every)
    for t in (0, 7, 8, 31):
        gemv(matrix, x[t : t + 1], bias, alone)
        assert torch.equal(alone[0], every[t])


def test_x_may_be_rows_of_a_wider_tensor():
    check(random_matrix(9, 129, "f16"), random_input(3, 200)[:, :129])


@every_kind
def test_nothing_is_written_beyond_the_output(kind):
    matrix, x = random_matrix(5, 129, kind), random_input(2, 129)
    room = torch.full((20,), 7.0, device=DEVICE)
    gemv(matrix, x, None, room[:10].view(2, 5))
    assert (room[10:] == 7).all() and (room[:10] != 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (9, 64)}, "1 to 4 tokens, or a multiple of 4 up to 32, got 9"),
        ({"x": (2, 63)}, "do not fit"),
        ({"out": (2, 5)}, "do not fit"),
        ({"bias": (5,)}, "do not fit"),
        ({"activation": "tanh"}, "unknown activation"),
    ],
)
def test_misfits_are_refused(change, message):
    given = {"x": (2, 64), "bias": (4,), "out": (2, 4), "activation": None} | change
    x, bias, out = (torch.zeros(given[name], device=DEVICE) for name in ("x", "bias", "out"))
    with pytest.raises(ValueError, match=message):
        gemv(random_matrix(4, 64, "bf16"), x, bias, out, activation=given["activation"])


def test_types_and_strides_are_refused():
    matrix, x = random_matrix(4, 64, "bf16"), random_input(2, 64)
    with pytest.raises(ValueError, match="f32"):
        gemv(matrix, x.double(), None, torch.zeros(2, 4, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        gemv(matrix, x, None, torch.zeros(4, 2, device=DEVICE).T)
