"""Training the predictors of a small model, and their file."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from predictor_cases import SPEC, random_layer, random_samples, small_spec
from safetensors.numpy import load_file

from predictor import partial
from predictor.bank import PredictorBank
from predictor.partial import TrainingState
from predictor.samples import split_documents
from predictor.target import PredictorTarget
from predictor.train import train_predictors
from profiler.common.artifact import ArtifactHeader, write_tensors
from profiler.common.errors import ArtifactError, ArtifactMismatchError, CorpusError, InputError

ROOMY = PredictorTarget(max_bytes_share=0.5)


def _train(spec=SPEC, layers=None, tokens=700, target=ROOMY, **options):
    layers = layers or [random_layer(seed, spec) for seed in range(spec.n_layers)]
    return train_predictors(spec, layers, *random_samples(5, tokens, spec), target, **options)


@pytest.fixture(scope="module")
def trained():
    return _train()


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"gated": False, "activation": "relu2"}, torch.float16),
        ({"d_model": 17, "d_ff": 61}, torch.bfloat16),
        ({"n_layers": 1, "d_model": 32, "d_ff": 5}, torch.float32),
    ],
)
def test_thresholds_miss_the_mass_asked_for_and_the_report_says_what_masks_do(changes, dtype):
    spec = small_spec(**changes)
    layers = [random_layer(seed, spec, dtype=dtype) for seed in range(spec.n_layers)]
    inputs, documents = random_samples(5, 1500, spec)
    bank, report = train_predictors(spec, layers, inputs, documents, ROOMY, seed=3)
    _, validation = split_documents(documents, 3)
    for layer, (weights, predictor, line) in enumerate(zip(layers, bank.predictors, report.layers, strict=True)):
        x = torch.from_numpy(inputs[layer, validation].astype(np.float32))
        fired, mass = weights.float().fired_and_mass(x)
        mask = predictor.mask(x)
        assert float(mass[~mask].sum() / mass.sum()) <= 0.0101
        assert line.recall == pytest.approx(float((mask & fired).sum() / fired.sum()), abs=2e-3)
        assert line.predicted_share == pytest.approx(float(mask.float().mean()), abs=2e-3)
        assert line.fired_share == pytest.approx(float(fired.float().mean()))
        assert (line.rank, line.bytes) == (predictor.rank, predictor.nbytes)
    assert report.tokens == len(validation)


def test_bytes_are_those_of_the_arrays_and_within_the_target(trained):
    bank, _ = trained
    for predictor, size in zip(bank.predictors, bank.bytes_per_layer, strict=True):
        parts = (getattr(predictor, name) for name in ("fc1", "fc1_scale", "b1", "fc2", "fc2_scale", "b2"))
        assert size == sum(part.nbytes for part in parts) + 4
    assert sum(bank.bytes_per_layer) <= 0.5 * SPEC.model_bytes


def test_a_gate_of_low_rank_is_predicted_almost_exactly():
    spec = small_spec(d_model=40, d_ff=60)
    _, report = _train(spec, [random_layer(seed, spec, rank=3) for seed in range(2)], tokens=1500)
    assert min(line.rank for line in report.layers) >= 3
    assert report.overall.precision > 0.98 and report.overall.missed_mass <= 0.01


def test_training_orders_neurons_better_than_chance_would(trained):
    _, report = trained
    point = next(point for point in report.curve if point.level == 0.04)
    assert point.precision > 2 * report.overall.fired_share and point.recall > 0.7


def test_training_is_deterministic_and_the_seed_matters(trained):
    first, (second, _), (other, _) = trained[0], _train(), _train(seed=1)
    for a, b in zip(first.predictors, second.predictors, strict=True):
        assert torch.equal(a.fc1, b.fc1) and torch.equal(a.fc2, b.fc2) and a.threshold == b.threshold
    assert not torch.equal(first.predictors[0].fc2, other.predictors[0].fc2)


def test_levels_of_the_curve_lie_on_one_line(trained):
    bank, report = trained
    shares = [point.predicted_share for point in report.curve]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
    point = report.curve[3]
    assert bank.with_thresholds(point.thresholds).thresholds == point.thresholds
    assert point.level == report.level and point.thresholds == bank.thresholds


def test_perplexity_sets_the_level():
    calls = []

    def perplexity_of(bank):
        calls.append(bank)
        return 10.0 if bank is None else 10.0 * (1.001 + np.mean(bank.thresholds) * 1e-4 + 2e-3)

    bank, report = _train(perplexity_of=perplexity_of)
    assert calls[0] is None and 2 <= len(calls) <= 6
    assert report.perplexity_increase <= 0.005
    assert any(report.perplexity_increase == perplexity_of(tried) / 10 - 1 for tried in calls[1:])
    assert bank.thresholds in [tried.thresholds for tried in calls[1:]]


def test_missed_targets_are_named():
    target = PredictorTarget(max_bytes_share=0.1, max_active_ratio=1.0)
    _, report = _train(target=target, perplexity_of=lambda bank: 10.0 if bank is None else 12.0)
    assert "perplexity rises by 20.00%" in report.shortfalls[0] and "--target" in report.shortfalls[1]


def test_dead_neurons_and_silent_layers():
    layers = [random_layer(seed) for seed in range(2)]
    layers[0].gate_bias[:10] = -100
    layers[1].gate_bias[:] = -100
    layers[1].gate_bias[0] = -4
    bank, report = _train(layers=layers)
    x = torch.from_numpy(random_samples(9, 400)[0][0].astype(np.float32))
    assert not bank.predictors[0].mask(x)[:, :10].any()
    assert report.layers[1].predicted_share < 0.2


class Told:
    """A progress that remembers what it is told, and interrupts after so many units."""

    def __init__(self, interrupt_after=None):
        self.said, self._left = [], interrupt_after

    @contextmanager
    def __call__(self, label, total, unit="token", done=0):
        self.said.append((label, done, total))
        yield self._advance

    def _advance(self, count):
        self.said.append(count)
        if self._left is not None and len([said for said in self.said if said == 1]) == self._left:
            raise KeyboardInterrupt


def perplexity_of(bank):
    return 10.0 if bank is None else 10.03


@pytest.fixture(scope="module")
def whole():
    """Bank, report and what a progress is told of a training that nothing interrupts."""
    told = Told()
    return *_train(progress=told, perplexity_of=perplexity_of), told


def test_progress_counts_layers_and_trials(whole):
    told = whole[2]
    assert told.said[:6] == [("ranks", 0, 2), 1, 1, ("train", 0, 2), 1, 1] and told.said[6] == ("thresholds", 0, 6)
    assert 2 <= told.said[7:].count(1) <= 6


@pytest.mark.parametrize(
    ("after", "kept", "begins"),
    [
        (1, "0 of 2 layers trained and 1 measured", [("ranks", 1, 2), 1, ("train", 0, 2), 1, 1]),
        (3, "1 of 2 layers trained and 2 measured", [("ranks", 2, 2), ("train", 1, 2), 1]),
        (5, "2 of 2 layers trained and 2 measured", [("ranks", 2, 2), ("train", 2, 2)]),
    ],
)
def test_an_interrupted_training_goes_on_where_it_ended(whole, tmp_path, after, kept, begins):
    path, made_from = tmp_path / "partial", {"profile": "abc", "seed": 0}
    with pytest.raises(KeyboardInterrupt, match=f"{kept} are kept, run it again to go on"):
        _train(state=TrainingState.of(path, SPEC, made_from), progress=Told(after), perplexity_of=perplexity_of)
    told = Told()
    bank, report = _train(state=TrainingState.of(path, SPEC, made_from), progress=told, perplexity_of=perplexity_of)
    assert told.said[: len(begins) + 1] == [*begins, ("thresholds", 0, 6)]
    assert report == whole[1] and bank.thresholds == whole[0].thresholds
    for a, b in zip(bank.predictors, whole[0].predictors, strict=True):
        assert all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("fc1", "b1", "fc1_scale", "fc2", "b2"))


def test_what_another_training_kept_is_not_used(tmp_path):
    path = tmp_path / "partial"
    assert not TrainingState.of(path, SPEC, {"seed": 0}).save()  # nothing is done
    with pytest.raises(KeyboardInterrupt):
        _train(state=TrainingState.of(path, SPEC, {"seed": 0}), progress=Told(3))
    assert len(TrainingState.of(path, SPEC, {"seed": 0}).predictors) == 1
    for other in (
        TrainingState.of(path, SPEC, {"seed": 1}),
        TrainingState.of(path, replace(SPEC, fingerprint="x"), {"seed": 0}),
    ):
        assert other.shares == other.predictors == []
    path.write_bytes(path.read_bytes()[:-1])
    assert TrainingState.of(path, SPEC, {"seed": 0}).shares == []


def test_a_killed_training_has_what_was_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_SAVE_SECONDS", -1.0)
    path = tmp_path / "partial"
    _train(state=TrainingState.of(path, SPEC, {}))
    assert len(TrainingState.of(path, SPEC, {}).predictors) == 2


def test_an_interrupt_without_a_file_passes_through():
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        _train(progress=Told(3))


def test_bad_inputs_are_refused():
    layers = [random_layer(seed) for seed in range(2)]
    inputs, documents = random_samples(5, 1500)
    with pytest.raises(InputError, match="hybrid profile"):
        train_predictors(SPEC, layers, inputs[:1], documents, ROOMY)
    with pytest.raises(CorpusError, match="more text"):
        train_predictors(SPEC, layers, inputs[:, :50], documents[:50], ROOMY)
    with pytest.raises(InputError, match="silu fires densely"):
        train_predictors(replace(SPEC, activation="silu"), layers, inputs, documents, ROOMY)


def test_file_round_trip(trained, tmp_path):
    bank, report = trained
    path = tmp_path / "predictors.safetensors"
    bank.save(path, SPEC, {"profile": "abc", "seed": 0}, report)
    loaded = PredictorBank.load(path, SPEC)
    x = torch.randn(11, SPEC.d_model)
    for a, b in zip(bank.predictors, loaded.predictors, strict=True):
        assert torch.equal(a.logits(x), b.logits(x)) and a.threshold == b.threshold
    assert loaded.report == report and loaded.header.made_from == {"profile": "abc", "seed": 0}


def test_file_of_another_model_is_refused(trained, tmp_path):
    bank, report = trained
    path = tmp_path / "predictors.safetensors"
    bank.save(path, SPEC, {}, report)
    with pytest.raises(ArtifactMismatchError, match="hybrid train"):
        PredictorBank.load(path, replace(SPEC, fingerprint="another"))


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": None},
        {"thresholds": np.zeros(1, np.float32)},
        {"layers.1.fc2": None},
        {"layers.0.b2": np.zeros(5, np.float32)},
        {"layers.0.fc1": np.zeros((2, 24), np.float32)},
        {"report": np.frombuffer(b"{", np.uint8)},
    ],
)
def test_file_that_is_not_whole_is_refused(trained, tmp_path, change):
    bank, report = trained
    path = tmp_path / "predictors.safetensors"
    bank.save(path, SPEC, {}, report)
    tensors = {name: value for name, value in (load_file(path) | change).items() if value is not None}
    write_tensors(path, ArtifactHeader("predictors", SPEC.fingerprint), tensors)
    with pytest.raises(ArtifactError, match="hybrid train"):
        PredictorBank.load(path, SPEC)
