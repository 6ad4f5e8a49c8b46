"""What predictors and their report may hold: what would predict nothing, or everything, silently is refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from bundle_cases import random_predictor, report_of
from predictor_cases import SPEC

from predictor.bank import KIND, PredictorBank, open_bank
from predictor.report import PredictorReport
from profiler.common.artifact import read_tensors, write_tensors
from profiler.common.errors import ArtifactError, InputError

NOT_FINITE = (np.nan, np.inf, -np.inf)


@pytest.fixture
def bank():
    return PredictorBank((random_predictor(SPEC, 3), random_predictor(SPEC, 5, seed=1)))


@pytest.fixture
def path(bank, tmp_path):
    bank.save(tmp_path / "predictors.safetensors", SPEC, {}, report_of(bank))
    return tmp_path / "predictors.safetensors"


def rewrite(path, **changes):
    """The file once more with some tensors changed, its digests right."""
    header, tensors = read_tensors(path, KIND, None, "")
    write_tensors(path, header, tensors | changes)


def refused(path, reason):
    with pytest.raises(ArtifactError, match=f"{reason}.*rebuild it with: hybrid train") as caught:
        PredictorBank.load(path, SPEC)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["fc1_scale", "b1", "fc2_scale", "b2"])
def test_scales_and_biases_that_are_not_finite(name, value, bank, path):
    changed = getattr(bank.predictors[1], name).clone()
    changed[-1] = value
    with pytest.raises(InputError, match=f"{name} has values that are not finite"):
        replace(bank.predictors[1], **{name: changed})
    rewrite(path, **{f"layers.1.{name}": changed.numpy()})
    refused(path, f"layer 1: a predictor's {name} has values that are not finite")


@pytest.mark.parametrize("value", NOT_FINITE)
def test_thresholds_that_are_not_finite(value, bank, path):
    with pytest.raises(InputError, match=r"threshold is .*expected a finite number"):
        bank.with_thresholds([0.5, value])
    rewrite(path, thresholds=np.array([0.5, value], np.float32))
    refused(path, "layer 1: a predictor's threshold is")


def test_a_threshold_that_f32_does_not_hold_is_refused_and_its_largest_taken(bank):
    with pytest.raises(InputError, match="threshold is 1e"):
        bank.predictors[0].with_threshold(1e39)
    assert bank.predictors[0].with_threshold(float(np.finfo(np.float32).min)).mask(torch.zeros(1, SPEC.d_model)).all()


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("thresholds", np.array([True, False]), "its thresholds are bool"),
        ("thresholds", np.zeros(2), "its thresholds are float64"),
        ("thresholds", np.zeros((2, 1), np.float32), "its thresholds are float32"),
        ("layers.0.b1", np.zeros(3), "b1 is torch.float64"),
        ("layers.0.b1", np.zeros((3, 1), np.float32), "b1 is torch.float32"),
        ("layers.0.b2", np.zeros(1, np.float32), "fc2 is torch.int8"),
        ("layers.1.fc1", np.zeros((4, 24), np.int8), "fc1 is torch.int8"),
        ("layers.1.fc1", np.zeros((5, 23), np.int8), "from 23 inputs"),
        ("layers.1.fc2", np.zeros((18, 5), np.int8), "fc2 is torch.int8"),
        ("layers.1.fc2_scale", np.ones(37, bool), "fc2_scale is torch.bool"),
        ("report", np.frombuffer(b"\xff", np.uint8), "invalid start byte"),
        ("report", np.frombuffer(b"[" * 99_999, np.uint8), "nests too deeply"),
    ],
)
def test_tensors_of_other_shapes_and_types(tensor, value, reason, path):
    rewrite(path, **{tensor: value})
    refused(path, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["overall"].update(recall=float("nan")), "recall nan"),
        (lambda r: r["overall"].update(predicted_share=-0.1), "no number below 0"),
        (lambda r: r["layers"][1].update(rank=True), "rank True"),
        (lambda r: r["layers"][0].update(bytes="many"), "bytes 'many'"),
        (lambda r: r["layers"][0].update(layer=3), "a layer's name"),
        (lambda r: r["layers"].pop(), "its report is of 1 layers and a curve, not all of 2"),
        (lambda r: r["curve"][0].update(thresholds=[0.5, float("inf")]), "threshold of layer 1 inf"),
        (lambda r: r["curve"][0].update(thresholds=[0.5]), "its report is of 2 layers and a curve, not all of 2"),
        (lambda r: r["curve"][0].update(perplexity=[]), r"perplexity \[\]"),
        (lambda r: r.update(perplexity_increase="0"), "perplexity_increase '0'"),
        (lambda r: r.update(tokens=None), "tokens None"),
        (lambda r: r.update(shortfalls=[1]), "lines of text"),
        (lambda r: r.update(shortfalls=3), "not iterable"),
        (lambda r: r.pop("layers"), "'layers'"),
    ],
)
def test_reports_that_make_no_sense(change, reason, bank, path):
    fields = json.loads(json.dumps(asdict(report_of(bank))))
    change(fields)
    rewrite(path, report=np.frombuffer(json.dumps(fields).encode(), np.uint8))
    refused(path, reason)


def test_predictors_are_read_one_at_a_time(bank, path):
    with open_bank(path, SPEC) as stored:
        for layer, predictor in enumerate(bank.predictors):
            found = stored.predictor(layer)
            assert torch.equal(found.fc2, predictor.fc2) and found.threshold == predictor.threshold
        assert stored.report() == report_of(bank) and isinstance(stored.report(), PredictorReport)
