"""What comes with a PowerInfer file, as artefacts of ours: its predictors, and the counts in `activation/` beside it.

They are written to the bundle when the model is first opened to run. What the user made there himself stays. The
placement that goes with them has nothing hot: beside a GPU the engine solves one from the counts, `hybrid prepare`
keeps it. PowerInfer's own index is not read: it was divided for another machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.console import percent, progress
from hybrid.errors import ArtifactError, InputError
from hybrid.formats.bundle import Bundle
from hybrid.formats.checkpoint import sample
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint, predictor_names
from hybrid.formats.powerinfer_counts import FOLDER, digest_of_counts, read_counts
from hybrid.model.loader import ModelFolder
from hybrid.model.reader import CheckpointReader
from placement import placement as placement_file
from placement.placement import Placement
from predictor import bank as predictor_bank
from predictor.bank import PredictorBank
from predictor.bias_free import agreement, of_residual
from profiler import profile as neuron_profile
from profiler.common.artifact import read_header
from profiler.common.spec import ModelSpec
from profiler.profile import IMPORTED, NeuronProfile

THRESHOLD = "powerinfer.sparse_threshold"


def is_powerinfer(folder: ModelFolder) -> bool:
    """Whether the model is a PowerInfer file."""
    return isinstance(folder.weights, GGUFCheckpoint) and folder.weights.file.powerinfer


def import_artefacts(folder: ModelFolder, bundle: Bundle) -> list[str]:
    """Write what came with `folder`, a PowerInfer file, to `bundle`; nothing for another model, or where it is there.

    Returns what a user should know of it. Raises `ModelError` for damaged predictors or counts, `ArtifactError` where
    the bundle cannot be written.
    """
    checkpoint, spec = folder.weights, folder.spec
    if not isinstance(checkpoint, GGUFCheckpoint) or not checkpoint.file.powerinfer:
        return []
    notices: list[str] = []
    counts = folder.path.parent / FOLDER
    origin = {IMPORTED: folder.path.name, "counts": digest_of_counts(counts, spec.n_layers, spec.d_ff)}
    if _is_due(bundle.profile, neuron_profile.KIND, spec, origin):
        notices.append(_import_counts(counts, bundle, spec, origin))
    problem = _unusable(checkpoint, spec)
    origin = {IMPORTED: folder.path.name, "predictors": _predictors_digest(checkpoint, spec)}
    if problem:
        notices += [] if _is_users(bundle.predictors, predictor_bank.KIND, spec) else [problem]
    elif _is_due(bundle.predictors, predictor_bank.KIND, spec, origin):
        notices.append(_import_predictors(checkpoint, bundle, spec, origin))
    if _is_due(bundle.placement, placement_file.KIND, spec, None):
        Placement.all_cold(spec).save(bundle.placement)
    return notices


def _is_due(path: Path, kind: str, spec: ModelSpec, origin: dict[str, Any] | None) -> bool:
    """Whether an artefact is to be written: none is there that can be read, or one that came from another `origin`."""
    try:
        made = read_header(path, kind, spec.fingerprint, "").made_from
    except ArtifactError:
        return True
    return origin is not None and IMPORTED in made and any(made.get(name) != value for name, value in origin.items())


def _is_users(path: Path, kind: str, spec: ModelSpec) -> bool:
    """Whether there is an artefact that did not come with the file."""
    try:
        return IMPORTED not in read_header(path, kind, spec.fingerprint, "").made_from
    except ArtifactError:
        return False


def _import_counts(folder: Path, bundle: Bundle, spec: ModelSpec, origin: dict[str, Any]) -> str:
    if origin["counts"] is None:
        counts = np.ones((spec.n_layers, spec.d_ff), np.int64)
        notice = f"no {FOLDER}/ beside the model: no neuron is known to be hotter than another"
    else:
        counts = read_counts(folder, spec.n_layers, spec.d_ff)
        notice = f"imported the firing counts in {folder}"
    tokens = max(1, int(counts.max()))
    origin = origin | {"tokens": "not known: the largest count"}
    header = NeuronProfile.make_header(spec, origin)
    inputs, validation = np.empty((spec.n_layers, 0, spec.d_model), np.float16), np.empty((0, 0), np.int32)
    NeuronProfile(header, counts, tokens, inputs, np.empty(0, np.int32), validation).save(bundle.profile)
    return notice


def _unusable(checkpoint: GGUFCheckpoint, spec: ModelSpec) -> str | None:
    """Why the file's predictors are not used; None where they are."""
    threshold = checkpoint.file.metadata.get(THRESHOLD, 0.0)
    if not any(name in checkpoint.file.tensors for layer in range(spec.n_layers) for name in predictor_names(layer)):
        return "the file has no predictors, so exact"
    if spec.norm != "rms":
        return (
            "the file's predictors read the residual; ours read what LayerNorm makes of it, which lost its mean: "
            "exact, until you train some: hybrid prepare MODEL --corpus FILE"
        )
    if not isinstance(threshold, float) or threshold != 0:
        return (
            f"the file's predictors decide at {str(threshold)[:40]} on the residual; ours read what the norm makes of "
            "it, which comes to the same for 0 alone: exact, until you train some: hybrid prepare MODEL --corpus FILE"
        )
    return None


def _predictors_digest(checkpoint: GGUFCheckpoint, spec: ModelSpec) -> str:
    digest = hashlib.sha256(str(checkpoint.file.metadata.get(THRESHOLD)).encode())
    for layer in range(spec.n_layers):
        for name in predictor_names(layer):
            if tensor := checkpoint.file.tensors.get(name):
                digest.update(f"{name} {tensor.type} {tensor.shape}".encode())
                digest.update(sample(tensor.path, tensor.start, tensor.end))
    return digest.hexdigest()[:16]


def _import_predictors(checkpoint: GGUFCheckpoint, bundle: Bundle, spec: ModelSpec, origin: dict[str, Any]) -> str:
    reader, made, agreed = CheckpointReader(spec, checkpoint), [], []
    with progress("first start: importing predictors", spec.n_layers, "layer") as advance:
        for layer in range(spec.n_layers):
            fc1, fc2 = checkpoint.predictor(layer)
            norm = reader.tensor("ffn_norm", layer).float()
            try:
                made.append(of_residual(fc1, fc2, norm))
            except InputError as error:
                return f"the file's predictors are not used, so exact: layer {layer}: {error}"
            agreed.append(agreement(made[-1], fc1, fc2, norm))
            advance(1)
    bank = PredictorBank(tuple(made))
    bank.save(bundle.predictors, spec, origin, None)
    share, least = float(np.mean(agreed)), min(agreed)
    return (
        f"imported the file's predictors as int8: on random inputs {percent(share)} of their decisions stay, "
        f"in no layer under {percent(least)}"
    )
