"""What prefill does between its GEMMs, against the references."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix
from matrix_cases import ACTIVATIONS

from gpu_kernels.dense import (
    activate_product,
    activate_product_ref,
    split,
    split_ref,
    widen,
    widen_ref,
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 1029)])
@pytest.mark.parametrize("run", [split, split_ref])
def test_terms_add_up_to_the_input(run, shape):
    x = random_input(*shape) * torch.logspace(-20, 20, shape[1], device=DEVICE)
    terms = torch.empty(3, *shape, dtype=torch.bfloat16, device=DEVICE)
    run(x, terms)
    assert (terms.double().sum(0) - x.double()).abs().le(x.abs() * 2.0**-23).all()
    assert (terms[1].abs() <= terms[0].abs() / 64).all()


def test_split_refuses_misfits():
    x, terms = random_input(2, 4), torch.empty(3, 2, 4, dtype=torch.bfloat16, device=DEVICE)
    for bad in ((x.double(), terms), (x.T, terms), (x, terms[:2]), (x, terms.float())):
        with pytest.raises(ValueError, match="split wants"):
            split(*bad)


@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (4, 300), (2, 1100)])
@pytest.mark.parametrize("kind", KINDS)
def test_widen_is_exact(kind, shape):
    matrix = random_matrix(*shape, kind)
    found, expected = (torch.full(shape, torch.nan, device=DEVICE) for _ in range(2))
    widen(matrix, found)
    widen_ref(matrix, expected)
    assert (found == expected).all()


def test_widen_refuses_misfits():
    for out in (torch.empty(3, 5), torch.empty(3, 4, dtype=torch.float64), torch.empty(4, 3).T):
        with pytest.raises(ValueError, match="widen wants"):
            widen(random_matrix(3, 4, "f32"), out.to(DEVICE))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation, gated):
    found, second = random_input(3, 700) * 4, random_input(3, 700, 2) if gated else None
    expected = found.clone()
    activate_product(found, second, activation)
    activate_product_ref(expected, second, activation)
    assert_close(found, expected)


def test_activation_refuses_misfits():
    with pytest.raises(ValueError, match="one shape"):
        activate_product(random_input(2, 3), random_input(3, 2), "relu")
