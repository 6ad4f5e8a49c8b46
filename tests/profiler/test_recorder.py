"""Profiling a small ReLU model by hooks: counts and samples against recomputation, interruption and resumption."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from profiler.common.errors import ArtifactError, ArtifactMismatchError, CorpusError
from profiler.common.progress import no_progress
from profiler.common.spec import ModelSpec
from profiler.corpus import TokenWindows
from profiler.profile import NeuronProfile
from profiler.recorder import ActivationRecorder, ProfileSettings, record_profile

LAYERS, WIDTH, NEURONS, CONTEXT = 2, 6, 11, 8
SPEC = ModelSpec("llama", LAYERS, WIDTH, NEURONS, 2, 2, 3, 50, 64, "relu", "f32", "abc", gated=False)


class FFN(nn.Module):
    """Computes its neurons in two blocks, as an FFN split between devices does."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH), nn.ReLU()

    def forward(self, x):
        z = self.up(x)
        return self.down(torch.cat([self.act(z[:, :4]), self.act(z[:, 4:])], 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, WIDTH), *(FFN() for _ in range(LAYERS))).requires_grad_(False)


@pytest.fixture
def windows():
    rng = np.random.default_rng(0)
    documents = np.sort(rng.integers(0, 30, 12 * CONTEXT).astype(np.int32)).reshape(12, CONTEXT)
    return TokenWindows(rng.integers(0, 50, (12, CONTEXT)), documents)


def record(model, windows, partial, forward=None, settings=None, header=None, progress=no_progress):
    recorder = ActivationRecorder(SPEC, list(model[1:]), [ffn.act for ffn in model[1:]])
    settings = settings or ProfileSettings(sample_tokens=20)
    header = header or NeuronProfile.make_header(SPEC, {"corpus": "x"})
    return record_profile(forward or model, recorder, windows, settings, header, partial, progress)


def test_counts_equal_recomputation(model, windows, tmp_path):
    found = record(model, windows, tmp_path / "p")
    x = model[0](torch.from_numpy(windows.tokens).reshape(-1))
    for layer, ffn in enumerate(model[1:]):
        assert (found.counts[layer] == (ffn.up(x) > 0).sum(0).numpy()).all()
        x = ffn(x)
    assert found.tokens == windows.tokens.size
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_samples_are_ffn_inputs_of_documents_that_validation_has_not(model, windows, tmp_path):
    found = record(model, windows, tmp_path / "p")
    assert found.inputs.shape == (LAYERS, 20, WIDTH) and found.inputs.dtype == np.float16
    assert (found.validation == windows.tokens[-3:]).all()
    assert not set(found.documents) & set(windows.documents[-3:].ravel())
    embedded = model[0].weight.half().numpy()
    assert all((row == embedded).all(1).any() for row in found.inputs[0])


def test_the_sample_is_bounded_in_bytes(model, windows, tmp_path):
    settings = ProfileSettings(sample_tokens=10**6, sample_bytes=2 * LAYERS * WIDTH * 7)
    assert record(model, windows, tmp_path / "p", settings=settings).inputs.shape[1] == 7


@pytest.mark.parametrize("at", [0, 5, 11])
def test_an_interrupted_run_goes_on_where_it_ended(model, windows, tmp_path, at):
    partial, calls = tmp_path / "partial", []

    def interrupted(tokens):
        if len(calls) == at:
            model[:2](tokens)  # the first layer has counted already
            raise KeyboardInterrupt
        calls.append(model(tokens))

    with pytest.raises(KeyboardInterrupt):
        record(model, windows, partial, interrupted)
    rest, told = [], []

    @contextmanager
    def progress(label, total, unit="token", done=0):
        told.extend([(label, total, done)])
        yield told.append

    resumed = record(model, windows, partial, lambda tokens: rest.append(model(tokens)), progress=progress)
    whole = record(model, windows, tmp_path / "other")
    assert len(rest) == 12 - at
    assert told == [("profile", 12 * CONTEXT, at * CONTEXT), *[CONTEXT] * (12 - at)]
    for name in ("counts", "inputs", "documents", "validation"):
        assert (getattr(resumed, name) == getattr(whole, name)).all()


def test_an_interrupt_after_a_window_ran_does_not_count_it_twice(model, windows, tmp_path):
    partial = tmp_path / "partial"
    recorder = ActivationRecorder(SPEC, list(model[1:]), [ffn.act for ffn in model[1:]])
    header, calls = NeuronProfile.make_header(SPEC, {"corpus": "x"}), []

    def interrupted(tokens):
        model(tokens)
        calls.append(tokens)
        if len(calls) == 6:
            raise KeyboardInterrupt  # the window's counts are all in, but it has not been taken over

    with pytest.raises(KeyboardInterrupt, match="5 of 12 windows are kept"):
        settings = ProfileSettings(sample_tokens=20)
        record_profile(interrupted, recorder, windows, settings, header, partial, no_progress)
    resumed, whole = record(model, windows, partial), record(model, windows, tmp_path / "other")
    assert (resumed.counts == whole.counts).all() and resumed.frequency().max() <= 1


def test_too_few_documents_are_refused_before_the_work(model, windows, tmp_path):
    one = TokenWindows(windows.tokens, np.zeros_like(windows.documents))
    with pytest.raises(CorpusError, match="too few documents"):
        record(model, one, tmp_path / "p", lambda tokens: pytest.fail("the model was run"))


def test_a_partial_file_of_another_run_is_not_used(model, windows, tmp_path):
    partial, calls = tmp_path / "partial", []

    def interrupted(tokens):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(model(tokens))

    with pytest.raises(KeyboardInterrupt):
        record(model, windows, partial, interrupted, header=NeuronProfile.make_header(SPEC, {"corpus": "y"}))
    rest = []
    record(model, windows, partial, lambda tokens: rest.append(model(tokens)))
    assert len(rest) == 12


def test_statistics():
    counts = np.array([[8, 0, 1, 1], [5, 5, 0, 0]])
    empty = np.zeros((2, 0, 6), np.float16)
    header = NeuronProfile.make_header(SPEC, {})
    found = NeuronProfile(header, counts, 10, empty, np.zeros(0, np.int32), np.zeros((0, 8), np.int32))
    assert found.frequency().tolist() == [[0.8, 0.0, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]]
    assert found.share_firing().tolist() == [0.25, 0.25]
    assert found.coverage(0.25) == 13 / 20 and found.coverage(1.0) == 1.0
    assert found.layer_coverage(0.25).tolist() == [0.8, 0.5]


def test_round_trip_and_refusals(model, windows, tmp_path):
    found = record(model, windows, tmp_path / "p")
    path = tmp_path / "profile.safetensors"
    found.save(path)
    again = NeuronProfile.load(path, SPEC)
    assert again.header == found.header and again.tokens == found.tokens
    assert all((getattr(again, n) == getattr(found, n)).all() for n in ("counts", "inputs", "documents", "validation"))
    with pytest.raises(ArtifactMismatchError, match=r"made for model abc, this model is other; run: hybrid profile"):
        NeuronProfile.load(path, replace(SPEC, fingerprint="other"))
    with pytest.raises(ArtifactError, match="is missing; make it with: hybrid profile"):
        NeuronProfile.load(tmp_path / "none", SPEC)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"corrupt|not a neuron profile"):
        NeuronProfile.load(path, SPEC)
