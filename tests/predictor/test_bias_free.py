"""Predictors whose biases have become a direction of their input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from predictor_cases import SPEC, random_layer

from predictor.bias_free import agreement, constant_direction, counted, of_residual, without_biases
from predictor.low_rank import LowRankPredictor
from profiler.common.errors import InputError

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


def residual_predictor(rank=6, norm_of=lambda g: torch.rand(D, generator=g) + 0.5):
    """fc1, fc2 and the norm's weights, with two units that do nothing."""
    g = torch.Generator().manual_seed(1)
    fc1, fc2 = torch.randn(rank, D, generator=g), torch.randn(F, rank, generator=g)
    fc1[2], fc2[:, 4] = 0, 0
    return fc1, fc2, norm_of(g)


def test_what_reads_the_residual_becomes_what_reads_the_normed_input():
    fc1, fc2, norm = residual_predictor()
    made = of_residual(fc1, fc2, norm)
    assert made.rank == 4 and not made.b1.any() and not made.b2.any() and made.threshold == 0
    kept = [0, 1, 3, 5]
    assert torch.allclose(made.fc1 * made.fc1_scale[:, None], fc1[kept] / norm, atol=0.03)
    assert torch.allclose(made.fc2 * made.fc2_scale[:, None], fc2[:, kept], atol=0.03)
    assert 0.97 < agreement(made, fc1, fc2, norm) < 1  # what int8 costs
    assert agreement(made, fc1, -fc2, norm) < 0.15  # no unit is above 0 for some tokens


def test_int8_rows_come_back_as_they_were():
    """As they were folded: times their scales, a power of two and the norm's weights, in f16."""
    q1, q2 = (torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(2)) for shape in ((5, D), (F, 5)))
    q1[:, 0], q2[:, 0] = 127, -127
    norm = 10.0 ** torch.linspace(-2, 2, D)  # far beyond a real norm's
    fc1, fc2 = (0.37 * q1 * norm).half().float(), (0.0021 * q2).half().float()
    made = of_residual(fc1, fc2, norm)
    assert torch.equal(made.fc1, q1.to(torch.int8)) and torch.equal(made.fc2, q2.to(torch.int8))
    assert agreement(made, fc1, fc2, norm) > 0.995


def test_a_weight_of_zero_takes_away_what_must_not_be_read():
    fc1, fc2, norm = residual_predictor()
    norm[3] = 0
    with pytest.raises(InputError, match="reads elements of the residual that the norm's weights of 0 take away"):
        of_residual(fc1, fc2, norm)
    fc1[:, 3] = 0
    made = of_residual(fc1, fc2, norm)
    assert not made.fc1[:, 3].any() and agreement(made, fc1, fc2, norm) > 0.97


def test_one_unit_is_left_where_none_does_anything():
    made = of_residual(torch.zeros(4, D), torch.ones(F, 4), torch.ones(D))
    assert made.rank == 1 and made.mask(torch.randn(3, D)).all()
