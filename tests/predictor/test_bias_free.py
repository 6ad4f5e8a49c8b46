"""Predictors whose biases have become a direction of their input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from predictor_cases import SPEC, random_layer

from predictor.bias_free import constant_direction, counted, without_biases
from predictor.low_rank import LowRankPredictor

D, F, TOKENS = SPEC.d_model, SPEC.d_ff, 600


def inputs(noise):
    """One element is nearly the same for all tokens, as in a language model's residual; others are around 0."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, D))
    x[:, 3] = -8 * (1 + noise * rng.standard_normal(TOKENS))
    return x.astype(np.float16)


def biased(x, threshold=0.5):
    """A predictor with large biases, of rank 5."""
    g = torch.Generator().manual_seed(0)
    fc1, fc2 = torch.randn(5, D, generator=g), torch.randn(F, 5, generator=g)
    fc1[:, 3] = 0
    b1, b2 = torch.randn(5, generator=g) * 3, torch.randn(F, generator=g) * 9
    made = LowRankPredictor.quantized(fc1, b1, fc2, b2, torch.from_numpy(x).float())
    return made.with_threshold(threshold)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_a_direction_is_as_constant_as_the_inputs_are(noise):
    x = inputs(noise)
    along = torch.from_numpy(x).float() @ constant_direction(x, np.arange(TOKENS))
    assert float(along.mean()) == pytest.approx(1, abs=1e-3)
    assert 0.8 * noise <= float(along.std()) <= 1.1 * noise  # other elements take a little of it away


def test_without_biases_the_same_neurons_are_predicted():
    x = inputs(0.005)
    before, wide = biased(x), torch.from_numpy(x).float()
    after = without_biases(before, constant_direction(x, np.arange(TOKENS)))
    assert not after.b1.any() and not after.b2.any() and after.threshold == 0 and after.rank == before.rank + 1
    wanted, found = before.mask(wide), after.mask(wide)
    assert 0.3 < wanted.float().mean() < 0.7
    assert float((wanted == found).float().mean()) > 0.985
    plain = replace(before, b1=after.b1[:-1], b2=after.b2, threshold=0.0)  # what leaving them out would do
    assert float((wanted == plain.mask(wide)).float().mean()) < 0.85


@pytest.mark.parametrize("factor", [1e-3, 1.0, 700.0])
def test_the_answer_does_not_depend_on_the_inputs_length(factor):
    x = inputs(0.05)
    made = without_biases(biased(x), constant_direction(x, np.arange(TOKENS)))
    wide = torch.from_numpy(x).float()
    logits, longer = made.logits(wide), made.logits(factor * wide)
    assert torch.allclose(longer, factor * logits, rtol=1e-3, atol=1e-3 * factor)


def test_a_layer_without_biases_and_one_of_zeros():
    x = inputs(0.01)
    zero = torch.zeros
    nothing = LowRankPredictor.quantized(zero(2, D), zero(2), zero(F, 2), zero(F), torch.from_numpy(x).float())
    made = without_biases(nothing, constant_direction(x, np.arange(TOKENS)))
    assert made.mask(torch.from_numpy(x).float()).all()  # 0 >= 0, as before
    assert constant_direction(np.zeros((TOKENS, D), np.float16), np.arange(TOKENS)).isfinite().all()


def test_counts_are_those_of_the_rows_that_were_asked_for():
    weights, x = random_layer(1), inputs(0.01)
    predictor, rows = biased(x), np.arange(5, 580)
    found = counted(predictor, weights, x, rows)
    wide = torch.from_numpy(x[rows]).float()
    (fired, mass), predicted = weights.fired_and_mass(wide), predictor.mask(wide)
    assert (found.pairs, found.predicted, found.fired) == (575 * F, int(predicted.sum()), int(fired.sum()))
    assert found.hits == int((predicted & fired).sum())
    assert found.mass == pytest.approx(float(mass.sum()), rel=1e-5)
    assert found.missed == pytest.approx(float(mass[~predicted].sum()), rel=1e-5)
