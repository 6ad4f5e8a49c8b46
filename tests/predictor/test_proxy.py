"""Proxies: scores, thresholds by share and by perplexity, counts, and their files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from predictor_cases import random_layer, random_samples, small_spec

from predictor.proxy import LayerProxy, ProxyBank, proxy_form
from predictor.proxy_fit import ProxyFit, ScoreHistogram
from predictor.row_copies import RowCopies, write_copies
from predictor.target import PredictorTarget
from profiler.common.errors import ArtifactError, ArtifactMismatchError, CorpusError, InputError

SPEC = small_spec(activation="silu")


def copies_of(layers, spec=SPEC):
    form, made = proxy_form(spec), []
    for layer in layers:
        parts = {"gate": layer.gate, "up": layer.up}
        made.append(form.layer({name: part.numpy() for name, part in parts.items() if part is not None}))
    return RowCopies(tuple(made), form)


def some_fit(spec=SPEC, tokens=300):
    layers = [random_layer(seed, spec) for seed in range(spec.n_layers)]
    inputs, _ = random_samples(3, tokens, spec)
    return ProxyFit.of(spec, copies_of(layers, spec), layers, inputs)


@pytest.fixture(scope="module")
def fit():
    return some_fit()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_scores_are_what_neurons_add_but_for_rounding(gated, activation):
    spec = small_spec(gated=gated, activation=activation)
    layer, x = random_layer(0, spec), torch.randn(50, spec.d_model)
    copies = copies_of([layer], spec).layers[0]
    scores = LayerProxy(copies, layer.down_norm.numpy(), 0.0).scores(layer, x)
    _, mass = layer.fired_and_mass(x)
    assert np.corrcoef(scores.flatten(), mass.flatten())[0, 1] > 0.98
    assert copies.up.dtype == "int4" and (copies.gate is None) == (not gated)


def test_a_layer_reordered_scores_its_neurons_elsewhere():
    layer, x = random_layer(0, small_spec(activation="silu", ffn_bias=False)), torch.randn(3, SPEC.d_model)
    plain = replace(layer, gate_bias=None)
    proxy = LayerProxy(copies_of([plain]).layers[0], layer.down_norm.numpy(), 0.5)
    order = np.random.default_rng(0).permutation(SPEC.d_ff)
    torch.testing.assert_close(proxy.reordered(order).scores(plain, x), proxy.scores(plain, x)[:, order])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_a_threshold_leaves_out_the_share_and_its_mass(share):
    rng = np.random.default_rng(0)
    scores, mass = (torch.from_numpy(rng.exponential(size=(400, 37)).astype(np.float32)) for _ in range(2))
    found = ScoreHistogram()
    for part in zip(scores.split(90), mass.split(90), strict=True):
        found.add(*part)
    passes, counts = scores >= found.threshold(share), found.counts(share)
    assert counts.predicted == int(passes.sum()) and counts.pairs == passes.numel()
    assert counts.missed == pytest.approx(float(mass[~passes].sum()))
    assert 1 - share <= counts.predicted_share < 1 - share + 0.01


def test_scores_beyond_the_range_are_counted():
    found = ScoreHistogram()
    found.add(torch.tensor([[0.0, 1e-30, 1.0, 1e30]]), torch.ones(1, 4))
    assert found.threshold(0.4) == 0.0 and found.counts(0.4).predicted == 4
    assert 1e-8 < found.threshold(0.5) <= 1.0 and found.counts(0.5).predicted == 2


def test_each_layer_leaves_out_the_same_share_and_counts_say_who_passed(fit):
    bank = fit.finished(0.6)
    assert bank.frequency().mean(axis=1) == pytest.approx([0.4, 0.4], abs=0.02)
    assert bank.report.overall.predicted_share == pytest.approx(0.4, abs=0.02)
    assert [point.predicted_share for point in bank.report.curve] == sorted(
        (point.predicted_share for point in bank.report.curve), reverse=True
    )
    x = torch.from_numpy(fit.inputs[1][fit.rows]).float()
    passing = bank.layer(1).scores(fit.layers[1], x) >= bank.thresholds[1]
    assert bank.counts[1].tolist() == passing.sum(0).tolist()


def test_the_search_keeps_the_perplexity_that_is_asked_for(fit):
    def perplexity_of(bank):
        return 20 * (1 + 0.2 * (0.0 if bank is None else share_of(bank)) ** 4)

    def share_of(bank):
        x = torch.from_numpy(fit.inputs[0][fit.rows]).float()
        return float((bank.layer(0).scores(fit.layers[0], x) < bank.thresholds[0]).float().mean())

    share, increase = fit.search(PredictorTarget(0.01), perplexity_of)
    assert 0.0085 <= increase <= 0.01 and share == pytest.approx((increase / 0.2) ** 0.25, abs=0.02)


def test_what_misses_the_target_is_said(fit):
    bank = fit.finished(0.5, 0.03, PredictorTarget(0.01))
    assert bank.report.shortfalls == ("perplexity rises by 3.00%, the target is 1.00%",)


def test_too_few_samples_and_other_shapes_are_refused(fit):
    with pytest.raises(CorpusError, match="samples 40 tokens, thresholds want at least 64"):
        some_fit(tokens=40)
    with pytest.raises(InputError, match="hybrid profile"):
        ProxyFit.of(SPEC, fit.bank.copies, fit.layers, fit.inputs[:1])


def written(fit, folder):
    bank, paths = fit.finished(0.6, 0.004), (folder / "proxy.safetensors", folder / "copies.safetensors")
    bank.save(paths[0], SPEC, {"profile": "abc"})
    write_copies(paths[1], SPEC, bank.copies.form, {}, bank.copies.layers)
    return bank, paths


def test_file_round_trip(fit, tmp_path):
    bank, paths = written(fit, tmp_path)
    found = ProxyBank.load(*paths, SPEC)
    assert found.report == bank.report and found.tokens == bank.tokens and found.header.made_from == {"profile": "abc"}
    for name in ("lengths", "thresholds", "counts"):
        assert np.array_equal(getattr(found, name), getattr(bank, name))
    x = torch.randn(3, SPEC.d_model)
    assert torch.equal(found.layer(1).scores(fit.layers[1], x), bank.layer(1).scores(fit.layers[1], x))
    assert found.bytes_per_layer == (SPEC.d_ff * (2 * (64 + 8) + 4),) * 2


def test_files_that_do_not_fit_are_refused(fit, tmp_path):
    bank, paths = written(fit, tmp_path)
    with pytest.raises(ArtifactMismatchError, match="hybrid train"):
        ProxyBank.load(*paths, replace(SPEC, fingerprint="f" * 16))
    replace(bank, counts=bank.counts + bank.tokens + 1).save(paths[0], SPEC, {})
    with pytest.raises(ArtifactError, match="it counts"):
        ProxyBank.load(*paths, SPEC)
    replace(bank, thresholds=np.full(2, np.nan, np.float32)).save(paths[0], SPEC, {})
    with pytest.raises(ArtifactError, match="not numbers from 0 on"):
        ProxyBank.load(*paths, SPEC)
    bank.save(paths[0], SPEC, {})
    paths[1].unlink()
    with pytest.raises(ArtifactError, match=r"copies\.safetensors is missing"):
        ProxyBank.load(*paths, SPEC)
