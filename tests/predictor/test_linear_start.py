"""The linear start of a predictor, its rounding, and the labels it learns from."""

import numpy as np
import pytest
import torch
from predictor_cases import random_layer, random_samples, small_spec

from predictor.linear_start import covariance, linear_start
from predictor.low_rank import LowRankPredictor, quantize_rows
from predictor.samples import batches, split_documents
from profiler.common.errors import CorpusError

SHAPES = [(24, 37), (17, 61), (33, 8), (5, 3)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu2", "fatrelu_0.2", "drelu"])
def test_labels_and_mass_are_those_of_the_ffn(gated, activation):
    spec = small_spec(gated=gated, activation=activation)
    weights, x = random_layer(0, spec, dtype=torch.bfloat16).float(), torch.randn(9, spec.d_model)
    fired, mass = weights.fired_and_mass(x)
    first = x @ weights.firing_weight.T + weights.firing_bias
    fires = first > (0.2 if activation == "fatrelu_0.2" else 0)
    hidden = (first * fires) ** (2 if activation == "relu2" else 1)
    if gated:
        up = x @ weights.up.T
        hidden = hidden * (up.clamp_min(0) if activation == "drelu" else up)
        fires &= (up > 0) | (activation != "drelu")
    assert torch.equal(fired, fires)
    contributions = hidden[:, :, None] * weights.down
    torch.testing.assert_close(mass, contributions.norm(dim=2))


def test_mass_of_an_activation_below_zero_is_a_length():
    weights, x = random_layer(0, small_spec(activation="silu")), torch.randn(9, 24)
    hidden = torch.nn.functional.silu(x @ weights.gate.T + weights.gate_bias) * (x @ weights.up.T)
    fired, mass = weights.fired_and_mass(x)
    assert fired.all() and (hidden < 0).any()
    torch.testing.assert_close(mass, (hidden[:, :, None] * weights.down).norm(dim=2))


@pytest.mark.parametrize(("d", "f"), SHAPES)
def test_covariance_is_that_of_the_chosen_rows(d, f):
    inputs = np.random.default_rng(0).standard_normal((3000, d)).astype(np.float32)
    rows = np.arange(0, 3000, 2)
    mean, cov = covariance(inputs, rows)
    np.testing.assert_allclose(mean, inputs[rows].mean(0), atol=1e-6)
    np.testing.assert_allclose(cov, np.cov(inputs[rows].T, bias=True), atol=0.02)


def test_covariance_of_fewer_tokens_than_dimensions_is_invertible():
    inputs = np.random.default_rng(0).standard_normal((10, 40)).astype(np.float32)
    _, cov = covariance(inputs, np.arange(10))
    assert torch.linalg.eigvalsh(cov).min() > 1e-3


@pytest.mark.parametrize(("d", "f"), SHAPES)
def test_start_is_the_truncated_svd_of_the_whitened_gate(d, f):
    spec = small_spec(d_model=d, d_ff=f)
    weights, (inputs, _) = random_layer(1, spec).float(), random_samples(2, 600, spec)
    rows, rank = np.arange(500), max(1, min(d, f) // 2)
    start = linear_start(weights, inputs[0], rows, rank, seed=0)
    mean, cov = covariance(inputs[0], rows)
    root = torch.linalg.cholesky(cov).numpy()
    left, values, right = np.linalg.svd(weights.firing_weight.double().numpy() @ root, full_matrices=False)
    closest = (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root)
    x = torch.cat(list(batches(inputs[0], rows)))
    gate = (x.double().numpy() - mean.numpy()) @ closest.T + start.center.numpy()
    fc1, b1, fc2, b2 = start.mlp(rank, linear_range=50.0)
    logits = (x @ fc1.T + b1).relu() @ fc2.T + b2
    np.testing.assert_allclose(logits / start.logit_scale(rank), gate, atol=2e-3)


def test_few_directions_are_those_of_the_exact_decomposition():
    """Random projections find them where singular values fall fast, as a layer's do."""
    spec = small_spec(d_model=64, d_ff=90)
    weights, (inputs, _) = random_layer(1, spec, rank=3).float(), random_samples(2, 900, spec)
    few, exact = (linear_start(weights, inputs[0], np.arange(900), rank, seed=0) for rank in (3, 4))
    torch.testing.assert_close(few.fc2 @ few.fc1, exact.fc2[:, :3] @ exact.fc1[:3], rtol=1e-4, atol=1e-4)


def test_residual_is_what_the_rank_leaves_unexplained():
    weights, (inputs, _) = random_layer(1).float(), random_samples(2, 4000)
    start = linear_start(weights, inputs[0], np.arange(4000), 12, seed=0)
    x = torch.cat(list(batches(inputs[0], np.arange(4000))))
    for rank in (1, 5, 12):
        gate = (x - start.mean) @ (start.fc2[:, :rank] @ start.fc1[:rank]).T + start.center
        error = gate - (x @ weights.firing_weight.T + weights.firing_bias)
        torch.testing.assert_close(start.residual(rank), error.std(dim=0), rtol=0.05, atol=1e-3)


def test_a_neuron_that_never_moves_is_decided_by_its_sign():
    weights, (inputs, _) = random_layer(1).float(), random_samples(2, 600)
    weights.gate[3] = 0
    weights.gate_bias[3] = 0
    weights.gate[4] = 0
    weights.gate_bias[4] = 0.1
    fc1, b1, fc2, b2 = linear_start(weights, inputs[0], np.arange(600), 8, seed=0).mlp(8)
    logits = (torch.randn(20, 24) @ fc1.T + b1).relu() @ fc2.T + b2
    assert (logits[:, 3] < -5).all() and (logits[:, 4] > 5).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (40, 129)])
def test_rounding_to_int8_stays_within_half_a_step(rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    quantized, scale = quantize_rows(weight)
    assert quantized.dtype == torch.int8
    error = (quantized.float() * scale[:, None] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 + 1e-7).all()


def test_rounding_keeps_the_mean_of_every_logit():
    rng = torch.Generator().manual_seed(0)
    fc1, fc2, x = (torch.randn(*shape, generator=rng) for shape in ((8, 24), (37, 8), (500, 24)))
    b1, b2 = torch.full((8,), 2.0), torch.randn(37, generator=rng)
    rounded = LowRankPredictor.quantized(fc1, b1, fc2, b2, x)
    exact = (x @ fc1.T + b1).relu() @ fc2.T + b2
    torch.testing.assert_close(rounded.logits(x).mean(0), exact.mean(0), atol=1e-4, rtol=0)
    assert (rounded.logits(x) - exact).std() < 0.02 * exact.std()


def test_reordering_permutes_the_neurons_only():
    rng = torch.Generator().manual_seed(0)
    fc1, fc2, x = (torch.randn(*shape, generator=rng) for shape in ((4, 24), (37, 4), (6, 24)))
    predictor = LowRankPredictor.quantized(fc1, torch.zeros(4), fc2, torch.zeros(37), x).with_threshold(0.3)
    order = torch.randperm(37, generator=rng)
    assert torch.equal(predictor.reordered(order).mask(x), predictor.mask(x)[:, order])


@pytest.mark.parametrize("lengths", [[300, 5], [5, 300], [100, 100, 100], [20] * 40, [900] + [3] * 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_document_is_on_both_sides(lengths, seed):
    documents = np.repeat(np.arange(len(lengths)) * 7, lengths)
    train, validation = split_documents(documents, seed)
    assert len(train) and len(validation) and len(train) + len(validation) == len(documents)
    assert not set(documents[train]) & set(documents[validation])
    assert len(train) >= len(validation)


@pytest.mark.parametrize("documents", [np.zeros(5000, int), np.arange(100)])
def test_too_few_samples_are_refused(documents):
    with pytest.raises(CorpusError, match="more text"):
        split_documents(documents, 0)
