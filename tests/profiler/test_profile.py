"""What a profile may hold: values of another range, type or size are refused when it is made and when it is read."""

import re
from dataclasses import replace

import numpy as np
import pytest
from artifact_cases import write_version_1
from bundle_cases import TOKENS, random_profile
from predictor_cases import SPEC

from profiler.common.artifact import read_tensors, write_tensors
from profiler.common.errors import ArtifactError, InputError
from profiler.profile import KIND, NeuronProfile


@pytest.fixture
def found():
    return random_profile(SPEC)


def with_value(array, at, value):
    changed = array.copy()
    changed[at] = value
    return changed


BAD = {
    "counts above the tokens": (lambda p: {"counts": with_value(p.counts, (1, 2), TOKENS + 1)}, "expected 0 to the"),
    "negative counts": (lambda p: {"counts": with_value(p.counts, (0, 0), -1)}, "expected 0 to the tokens"),
    "counts of floats": (lambda p: {"counts": p.counts.astype(np.float64)}, "counts are float64"),
    "counts of one axis": (lambda p: {"counts": p.counts[0]}, "expected int64 of 2 axes"),
    "counts of fewer layers": (lambda p: {"counts": p.counts[:1]}, "counts of 1 layers"),
    "inputs with NaN": (lambda p: {"inputs": with_value(p.inputs, (1, 3, 4), np.nan)}, "inputs of layer 1 are not all"),
    "infinite inputs": (lambda p: {"inputs": with_value(p.inputs, (0, 0, 0), -np.inf)}, "inputs of layer 0 are not"),
    "inputs of f32": (lambda p: {"inputs": p.inputs.astype(np.float32)}, "inputs are float32"),
    "inputs of fewer tokens": (lambda p: {"inputs": p.inputs[:, 1:]}, "sampled tokens"),
    "negative documents": (lambda p: {"documents": with_value(p.documents, 5, -1)}, "from 0 on, found negative"),
    "boolean documents": (lambda p: {"documents": p.documents > 0}, "documents are bool"),
    "negative token ids": (lambda p: {"validation": with_value(p.validation, (1, 1), -2)}, "found negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_no_profile_has(case, found, tmp_path):
    change, reason = BAD[case]
    with pytest.raises(InputError, match=reason):
        replace(found, **change(found))
    path = tmp_path / "profile.safetensors"
    tensors = {name: getattr(found, name) for name in ("counts", "inputs", "documents", "validation")}
    write_tensors(path, found.header, tensors | {"tokens": np.array([TOKENS])} | change(found))
    with pytest.raises(ArtifactError, match=re.escape(str(path)) + " is corrupt: .*rebuild it with: hybrid profile"):
        NeuronProfile.load(path, SPEC)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [(np.array([0]), "profile of 0 tokens"), (np.array([400.0]), "is float64"), (np.array([4, 4]), r"is int64 \[2\]")],
)
def test_counts_of_tokens_that_are_none(tokens, reason, found, tmp_path):
    found.save(tmp_path / "p")
    header, tensors = read_tensors(tmp_path / "p", KIND, None, "")
    write_tensors(tmp_path / "p", header, tensors | {"tokens": tokens})
    with pytest.raises(ArtifactError, match=reason):
        NeuronProfile.load(tmp_path / "p", SPEC)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [({"d_ff": 36}, r"counts of shape \(2, 37\)"), ({"d_model": 23}, "width 24"), ({"vocab_size": 40}, "token id 4")],
)
def test_sizes_of_another_model(spec, reason, found, tmp_path):
    found.save(tmp_path / "p")
    with pytest.raises(ArtifactError, match=reason):
        NeuronProfile.load(tmp_path / "p", replace(SPEC, **spec))


def test_without_samples(found, tmp_path):
    found.save(tmp_path / "p")
    counts = NeuronProfile.load(tmp_path / "p", SPEC, samples=False)
    assert counts.header == found.header and (counts.frequency() == found.frequency()).all()
    for slim in (counts, found.without_samples()):
        assert not slim.inputs.size and not slim.documents.size and not slim.validation.size
        slim.save(tmp_path / "slim")
        assert (NeuronProfile.load(tmp_path / "slim", SPEC).counts == found.counts).all()


def test_version_1_is_read_and_its_values_are_checked(found, tmp_path):
    tensors = {name: getattr(found, name) for name in ("counts", "inputs", "documents", "validation")}
    tensors["tokens"] = np.array([TOKENS])
    write_version_1(tmp_path / "p", found.header, tensors)
    assert NeuronProfile.load(tmp_path / "p", SPEC).header.key == found.header.key
    write_version_1(tmp_path / "p", found.header, tensors | {"tokens": np.array([3])})
    with pytest.raises(ArtifactError, match="expected 0 to the tokens"):
        NeuronProfile.load(tmp_path / "p", SPEC)
