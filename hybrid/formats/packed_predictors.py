"""The predictors of a packed model, as the kernels want them and memory-mapped: codes padded, neurons in packed order.

`packed_predictors.safetensors` lies beside the weights. It holds, per layer, fc1 int8 [r, padded(d)], fc2 int8
[f, padded(r)], their scales and biases f32, and all thresholds; each tensor starts on a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from cpu_kernels.blocks import padded
from cpu_kernels.low_rank import PredictorView
from hybrid.errors import ArtifactError, ArtifactMismatchError
from hybrid.formats.packed import ALIGNMENT, REPAIR, Part, TensorMap, order_hash
from predictor import bank
from predictor.bank import StoredBank, open_bank
from profiler.common.artifact import ArtifactFile, ArtifactHeader, TensorWriter, atomic_write, open_artifact
from profiler.common.spec import ModelSpec

PREDICTORS_FILE = "packed_predictors.safetensors"
KIND = "packed predictors"
_VECTORS = ("fc1_scale", "b1", "fc2_scale", "b2")


def pack_predictors(source: Path, spec: ModelSpec, order: np.ndarray, target: Path) -> None:
    """Write the bank `source` to the packed folder `target`, a layer at a time, and read it back; done already, nothing
    is written.

    order: [n_layers, d_ff], the neurons of each layer. Raises `ArtifactError` for a damaged bank.
    """
    with open_bank(source, spec, bank.REPAIR) as stored:
        header = ArtifactHeader(
            KIND, spec.fingerprint, {"predictors": stored.file.header.key, "order": order_hash(order)}
        )
        path = target / PREDICTORS_FILE
        if _is_whole(target, header):
            return
        entries = list(_parts(spec, _ranks(stored.file, spec)))
        with atomic_write(path) as file:
            writer = TensorWriter(file, header, [part.entry for part in entries], ALIGNMENT)
            for part, array in zip(entries, _arrays(stored, spec, order), strict=True):
                writer.add(part.name, [np.ascontiguousarray(array)])
            writer.finish()
    with open_packed_predictors(target, spec) as file:
        file.check()


def open_packed_predictors(folder: Path, spec: ModelSpec) -> AbstractContextManager[ArtifactFile]:
    """The predictors of a packed folder as a file, such as to `check` them. Raises `ArtifactError`."""
    return open_artifact(folder / PREDICTORS_FILE, KIND, spec.fingerprint, REPAIR)


def open_predictors(folder: Path, spec: ModelSpec, order: np.ndarray) -> list[PredictorView]:
    """The predictors of the packed model in `folder`, one a layer, views on one map. Codes are not read.

    Raises `ArtifactError` when there are none or they are damaged, `ModelError` for tensors of other shapes, types or
    places, `ArtifactMismatchError` for another order than the weights'.
    """
    with open_packed_predictors(folder, spec) as file:
        if file.header.made_from.get("order") != order_hash(order):
            raise ArtifactMismatchError(f"{file.path} has its neurons in another order than the weights; run: {REPAIR}")
        mapped = TensorMap.of(file, list(_parts(spec, _ranks(file, spec))))
        thresholds = _finite(file, "thresholds")
        return [_predictor(file, mapped, layer, thresholds[layer], spec) for layer in range(spec.n_layers)]


def _is_whole(target: Path, header: ArtifactHeader) -> bool:
    """Whether the folder's predictors are those of `header`, and whole."""
    try:
        with open_artifact(target / PREDICTORS_FILE, KIND, header.model_fingerprint, REPAIR) as file:
            file.check()
            return file.digests is not None and file.header.key == header.key
    except ArtifactError:
        return False  # none there, or another one: written now


def _ranks(file: ArtifactFile, spec: ModelSpec) -> list[int]:
    """Each layer's rank, as long as its b1."""
    shapes = [file.place(f"layers.{layer}.b1").shape for layer in range(spec.n_layers)]
    return [shape[0] if shape else 0 for shape in shapes]


def _parts(spec: ModelSpec, ranks: list[int]) -> Iterator[Part]:
    """Every tensor in the order of the file."""
    yield Part("thresholds", (spec.n_layers,), "f32")
    for layer, rank in enumerate(ranks):
        at = f"layers.{layer}"
        yield Part(f"{at}.fc1", (rank, padded(spec.d_model)), "i8")
        yield Part(f"{at}.fc2", (spec.d_ff, padded(rank)), "i8")
        for name, n in zip(_VECTORS, (rank, rank, spec.d_ff, spec.d_ff), strict=True):
            yield Part(f"{at}.{name}", (n,), "f32")


def _arrays(stored: StoredBank, spec: ModelSpec, order: np.ndarray) -> Iterator[np.ndarray]:
    """What `_parts` names, from a bank."""
    yield stored.thresholds
    for layer in range(spec.n_layers):
        p = stored.predictor(layer).reordered(torch.from_numpy(order[layer].astype(np.int64)))
        view = PredictorView.of(p.fc1, p.fc1_scale, p.b1, p.fc2, p.fc2_scale, p.b2, p.threshold)
        yield from (view.fc1, view.fc2, view.s1, view.b1, view.s2, view.b2)


def _predictor(file: ArtifactFile, mapped: TensorMap, layer: int, threshold: float, spec: ModelSpec) -> PredictorView:
    at = f"layers.{layer}"
    s1, b1, s2, b2 = (_finite(file, f"{at}.{name}") for name in _VECTORS)
    fc1, fc2 = mapped.stored(f"{at}.fc1"), mapped.stored(f"{at}.fc2")
    if not len(b1):
        raise ArtifactError(f"{file.path}: the predictor of layer {layer} has rank 0; pack the model again: {REPAIR}")
    return PredictorView(fc1, s1, b1, fc2, s2, b2, np.float32(threshold), spec.d_model)


def _finite(file: ArtifactFile, name: str) -> np.ndarray:
    """A vector, which must be finite: with others a predictor would predict nothing, or everything, silently."""
    found = file.array(name)
    if not np.isfinite(found).all():
        raise ArtifactError(f"{file.path}: tensor '{name}' is not all finite; pack the model again: {REPAIR}")
    return found
