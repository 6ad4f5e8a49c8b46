"""What prefill does between its GEMMs, against the references."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix
from matrix_cases import ACTIVATIONS

from gpu_kernels.dense import (
    hidden_terms,
    hidden_terms_ref,
    sum_products,
    sum_products_ref,
    widen,
    widen_ref,
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (4, 300), (2, 1100)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_widen_is_exact(dtype, kind, shape):
    matrix = random_matrix(*shape, kind)
    found, expected = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    widen(matrix, found)
    widen_ref(matrix, expected)
    assert (found == expected).all()


def test_widen_refuses_misfits():
    for out in (torch.empty(3, 5), torch.empty(3, 4, dtype=torch.float64), torch.empty(4, 3).T):
        with pytest.raises(ValueError, match="widen wants"):
            widen(random_matrix(3, 4, "f32"), out.to(DEVICE))


def some_products(terms, tokens, n, seed=1):
    """Of a large and a small term, and scales that are not 1."""
    shares = torch.tensor([1.0, 2.0**-9], device=DEVICE)[:terms, None, None]
    products = random_input(terms * tokens, n, seed).view(terms, tokens, n) * shares
    return products, 2.0 ** torch.arange(-3, tokens - 3, device=DEVICE)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("terms", "tokens", "n"), [(1, 1, 1), (2, 5, 1029)])
def test_products_are_summed(terms, tokens, n, biased, add):
    products, scales = some_products(terms, tokens, n)
    bias, wide = random_input(1, n, 3)[0] if biased else None, random_input(tokens, n + 7, 2)
    expected, found = wide.clone(), wide
    sum_products(products, scales, bias, found[:, 3 : n + 3], add)
    sum_products_ref(products, scales, bias, expected[:, 3 : n + 3], add)
    assert_close(found, expected, 1e-6)
    assert torch.equal(found[:, :3], expected[:, :3]) and torch.equal(found[:, n + 3 :], expected[:, n + 3 :])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_values_in_terms(activation, gated):
    (up, scales), gate = some_products(2, 3, 700), some_products(2, 3, 700, 2)[0] if gated else None
    biases = (random_input(1, 700, 3)[0] if gated else None, random_input(1, 700, 4)[0])
    made = [[torch.empty(2, 3, 700, dtype=torch.bfloat16, device=DEVICE), scales.clone()] for _ in range(2)]
    hidden_terms(gate, up, scales, biases, activation, *made[0])
    hidden_terms_ref(gate, up, scales, biases, activation, *made[1])
    found, expected = (terms.double().sum(0) * own.double()[:, None] for terms, own in made)
    assert_close(found, expected, 5e-6 if DEVICE == "cuda" else 5e-5)  # the interpreter cuts bf16 off


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_hidden_values_of_any_size_and_type(dtype):
    """f16 would hold neither 1e20 nor what is left of 1e-20; a row of zeros stays one."""
    up, scales = some_products(2 if dtype == torch.float16 else 1, 3, 65)
    up *= torch.tensor([1e20, 1e-20, 0], device=DEVICE)[:, None]
    terms, own = torch.empty(up.shape, dtype=dtype, device=DEVICE), torch.empty(3, device=DEVICE)
    hidden_terms(None, up, scales, (None, None), "relu", terms, own)
    expected = (up.double().sum(0) * scales[:, None]).relu()
    for found, row in zip(terms.double().sum(0) * own.double()[:, None], expected, strict=True):
        assert_close(found, row, 1e-6)


def test_products_and_hidden_values_refuse_misfits():
    (products, scales), out = some_products(2, 3, 4), torch.empty(3, 4, device=DEVICE)
    wrong = [(bad, scales, None, out) for bad in (products.double(), products.mT, products[0])]
    wrong += [(products, scales[1:], None, out), (products, scales, scales, out)]
    wrong += [(products, scales, None, bad) for bad in (out[1:], out.half(), torch.empty(4, 3, device=DEVICE).T)]
    for bad in wrong:
        with pytest.raises(ValueError, match="sum_products wants"):
            sum_products(*bad, add=False)
    for gate, terms in ((products[:1], products), (None, products[:1]), (products[:, 1:], products)):
        with pytest.raises(ValueError, match="hidden_terms wants"):
            hidden_terms(gate, products, scales, (None, None), "relu", terms, scales)
