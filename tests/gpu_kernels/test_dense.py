"""What prefill does between its GEMMs, against the references."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix
from matrix_cases import ACTIVATIONS

from gpu_kernels.dense import (
    activate_product,
    activate_product_ref,
    causal_softmax,
    causal_softmax_ref,
    gather,
    gather_ref,
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


@pytest.mark.parametrize("window", [None, 1, 3, 1000])
@pytest.mark.parametrize(
    ("heads", "queries", "group", "first_query", "first_key", "keys"),
    [(1, 1, 1, 0, 0, 1), (2, 5, 3, 0, 0, 5), (2, 3, 1, 14, 0, 17), (1, 2, 2, 1100, 0, 1102), (1, 2, 1, 8, 6, 4)],
)
def test_softmax(heads, queries, group, first_query, first_key, keys, window):
    found = random_input(heads, queries * group * keys).view(heads, queries * group, keys) * 5
    expected = found.clone()
    causal_softmax(found, group, first_query, first_key, window)
    causal_softmax_ref(expected, group, first_query, first_key, window)
    assert_close(found, expected)
    assert_close(found.sum(-1), torch.ones(heads, queries * group))
    assert ((found == 0) == (expected == 0)).all()


def test_softmax_by_hand():
    scores = torch.zeros(1, 3, 4, device=DEVICE)
    causal_softmax(scores, 1, 1, 0, 2)
    assert scores[0].tolist() == [[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]


def test_softmax_refuses_misfits():
    for bad in (torch.zeros(3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 4, 4).mT, torch.zeros(1, 4, 4).double()):
        with pytest.raises(ValueError, match="causal_softmax wants"):
            causal_softmax(bad.to(DEVICE), 2, 0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "head_dim"), [(1, 1), (8, 24), (32, 129)])
def test_blocks_are_gathered_in_the_tables_order(dtype, size, head_dim):
    cache = random_input(7, 2 * 3 * size * head_dim).view(7, 2, 3, size, head_dim).to(dtype)
    table = torch.tensor([5, 0, 6, 1], dtype=torch.int32, device=DEVICE)
    found, expected = (torch.full((2, 3, 6 * size, head_dim), 7.0, device=DEVICE) for _ in range(2))
    gather(cache, table, found[:, :, : 4 * size])
    gather_ref(cache, table, expected[:, :, : 4 * size])
    assert torch.equal(found, expected) and (found[:, :, 4 * size :] == 7).all()
    assert torch.equal(found[1, 2, size : 2 * size], cache[0, 1, 2].float())
    for bad in ((cache, table.long(), found), (cache, table, found), (cache.transpose(0, 1), table, found)):
        with pytest.raises(ValueError, match="gather wants"):
            gather(*bad)


@pytest.mark.parametrize(("size", "head_dim"), [(1, 1), (32, 129)])
def test_codes_are_gathered_with_their_scales(size, head_dim):
    cache = (
        (50 * random_input(7, 2 * 3 * size * head_dim)).view(7, 2, 3, size, head_dim).clamp(-127, 127).to(torch.int8)
    )
    scales = random_input(7, 2 * 3 * size, seed=2).view(7, 2, 3, size)
    table = torch.tensor([5, 0, 6, 1], dtype=torch.int32, device=DEVICE)
    found, expected = (torch.full((2, 3, 4 * size, head_dim), 7.0, device=DEVICE) for _ in range(2))
    gather(cache, table, found, scales)
    gather_ref(cache, table, expected, scales)
    assert torch.equal(found, expected)
    assert torch.equal(found[1, 2, size : 2 * size], cache[0, 1, 2] * scales[0, 1, 2][:, None])
    with pytest.raises(ValueError, match="f32 scales"):
        gather(cache, table, found)
