"""Rounding with error feedback: the same format, and less error in what the weights are multiplied with."""

import shutil

import numpy as np
import pytest
import torch
from model_cases import make_model
from packed_cases import pack, place

from cpu_kernels.activations import activate_ref
from cpu_kernels.blocks import dequantize, quantize
from hybrid.formats.packed import PackedModel
from hybrid.model.loader import ModelFolder
from hybrid.offline import error_feedback
from hybrid.offline.error_feedback import feedback_factor, quantize_by_columns, quantize_by_rows
from profiler.profile import NeuronProfile


def correlated(rng, tokens, width):
    """Inputs f32 [tokens, width] that mostly lie in a few directions, as a model's do."""
    few = rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, width))
    return (few + 0.3 * rng.standard_normal((tokens, width))).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(5, 1), (9, 17), (40, 33), (1, 300)])
def test_columns_make_up_for_each_other(n, d, monkeypatch):
    monkeypatch.setattr(error_feedback, "SPAN", 128)
    rng = np.random.default_rng(d)
    inputs, weight = correlated(rng, 400, d), rng.standard_normal((n, d)).astype(np.float32)
    factors = [feedback_factor(inputs[:, at : at + 128]) for at in range(0, d, 128)]
    rows = quantize_by_columns(weight, factors)
    plain = quantize(weight, "int4")
    assert (rows.shape, rows.dtype) == (plain.shape, plain.dtype)
    cost, plainly = (np.square(inputs @ (weight - dequantize(r, d)).T).sum() for r in (rows, plain))
    assert cost <= plainly * (1 if d == 1 else 0.7)


@pytest.mark.parametrize(("k", "d"), [(1, 5), (17, 1), (33, 40), (100, 129)])
def test_rows_make_up_for_each_other(k, d):
    rng = np.random.default_rng(k)
    inputs, weight = correlated(rng, 400, k), rng.standard_normal((k, d)).astype(np.float32)
    rows = quantize_by_rows(weight, feedback_factor(inputs))
    cost, plainly = (np.square(inputs @ (weight - dequantize(r, d))).sum() for r in (rows, quantize(weight, "int4")))
    # A block of one weight is exact but for its scale, so there is hardly an error to make up for.
    assert cost <= plainly * (1.01 if d == 1 or k == 1 else 0.6)


def test_without_inputs_it_is_plain_rounding():
    weight = np.random.default_rng(0).standard_normal((9, 70)).astype(np.float32)
    columns, rows = feedback_factor(np.zeros((3, 70), np.float32)), feedback_factor(np.zeros((3, 9), np.float32))
    np.testing.assert_array_equal(quantize_by_columns(weight, [columns]), quantize(weight, "int4"))
    np.testing.assert_array_equal(quantize_by_rows(weight, rows), quantize(weight, "int4"))


def test_weights_that_are_not_finite_are_refused():
    weight = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="finite"):
        quantize_by_columns(weight, [np.eye(3, dtype=np.float32)])
    with pytest.raises(ValueError, match="finite"):
        quantize_by_rows(weight, np.eye(2, dtype=np.float32))


@pytest.mark.parametrize("name", ["llama-relu", "opt"])
def test_a_profile_makes_int4_better(name, tmp_path):
    """The FFN's result on the profile's own inputs is nearer to the source's; a new profile packs again."""
    pytest.importorskip("transformers")
    model = tmp_path / "model"
    make_model(name, model)
    order = place(model)
    spec = ModelFolder.open(model).spec
    pack(model, tmp_path / "plain", "int4")
    inputs = np.stack([correlated(np.random.default_rng(at), 500, spec.d_model) for at in range(spec.n_layers)])
    save_profile(model, spec, inputs)
    shutil.copytree(tmp_path / "plain", tmp_path / "fed")
    assert pack(model, tmp_path / "fed", "int4").written and not pack(model, tmp_path / "fed", "int4").written
    errors = {}
    for kind in ("plain", "fed"):
        found = PackedModel.open(tmp_path / kind)
        errors[kind] = sum(ffn_error(model, found, layer, order[layer], inputs[layer]) for layer in range(3))
    assert errors["fed"] < 0.6 * errors["plain"]


def save_profile(model, spec, inputs):
    header = NeuronProfile.make_header(spec, {"corpus": "none"})
    counts = np.zeros((spec.n_layers, spec.d_ff), np.int64)
    documents, validation = np.zeros(inputs.shape[1], np.int32), np.zeros((0, 8), np.int32)
    profile = NeuronProfile(header, counts, 500, inputs.astype(np.float16), documents, validation)
    profile.save(model / "hybrid" / "profile.safetensors")


def ffn_error(model, found, layer, order, inputs):
    """Squared error of the packed FFN's result, f32, against the source's."""
    source, x, spec = ModelFolder.open(model).ffn_tensors(layer), torch.from_numpy(inputs), found.spec
    at = f"layers.{layer}."

    def ffn(gate, up, down, gate_bias, up_bias):
        up = torch.nn.functional.linear(x, up, up_bias)
        gated = up if gate is None else torch.nn.functional.linear(x, gate, gate_bias)
        return (activate_ref(spec.activation, gated) * (1 if gate is None else up)) @ down

    shape = (spec.d_ff, spec.d_model)
    back = torch.from_numpy(np.argsort(order))
    gate, up, down = (
        found.matrix(at + name, *shape).widen()[back] if name != "gate" or spec.gated else None
        for name in ("gate", "up", "down")
    )
    truth = ffn(source.gate, source.up, source.down, source.gate_bias, source.up_bias)
    return float((ffn(gate, up, down, source.gate_bias, source.up_bias) - truth).square().sum())
