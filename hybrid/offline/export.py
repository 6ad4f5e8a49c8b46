"""A prepared model as the files that PowerInfer runs.

DIR/NAME.powerinfer.gguf                   weights, and predictors as fc1 and fc2
DIR/activation/activation_{layer}.pt       firings of each neuron, for PowerInfer to divide another budget by
DIR/NAME.powerinfer.gguf.generated.gpuidx  which neurons our placement has hot
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.errors import InputError
from hybrid.formats import powerinfer
from hybrid.formats.new_folder import new_folder
from hybrid.formats.powerinfer import Tensor
from hybrid.offline.powerinfer_model import FileType, PowerInferModel, architecture_of, name_of, padded, padded_size
from hybrid.offline.project import Project
from placement.placement import Placement
from predictor.bank import PredictorBank
from predictor.bias_free import constant_direction, counted, without_biases
from predictor.report import Quality, overall_counts
from predictor.samples import BATCH, split_documents
from profiler.common.progress import Progress
from profiler.common.spec import ModelSpec
from profiler.profile import NeuronProfile


@dataclass(frozen=True)
class ExportResult:
    """What was written, and the predictors' quality on validation documents, with biases and without.

    perplexity_increase: of the exported predictors over dense; None where the profile has no text to measure it on.
    hot: neurons, of all layers.
    """

    model: Path
    nbytes: int
    before: Quality
    after: Quality
    perplexity_increase: float | None
    hot: int


def export(project: Project, out: Path, kind: FileType, progress: Progress) -> ExportResult:
    """Write the folder `out`, whole or not at all, in place of an earlier export; `project` must be prepared.

    Raises `InputError` for a model that PowerInfer does not run or `kind` cannot hold, `ArtifactError` for artefacts
    that are not there.
    """
    project.require_source()
    architecture_of(project.spec)
    name = f"{name_of(project.folder)}.powerinfer.gguf"
    if out.exists() and not (out / name).is_file():
        raise InputError(f"{out} is there and no export of this model; choose another with --powerinfer")
    found, bank = project.load_profile(), project.load_predictors()
    if found.is_imported:
        raise InputError(f"{project.folder.path} is PowerInfer's already; to export other predictors, train some first")
    placement = project.bundle.load_placement(project.spec)
    free, before, after = bias_free(project, found, bank, progress)
    model = PowerInferModel(project.folder, free, found.inputs[:, :BATCH], kind)
    tensors = model.tensors()
    with new_folder(out, sum(tensor.nbytes for tensor in tensors), "--powerinfer") as folder:
        with progress("powerinfer", len(tensors), "tensor") as advance:
            try:
                powerinfer.write(folder / name, model.metadata(), tensors, advance)
            except ValueError as error:
                raise InputError(f"{error}; this model cannot be written as {kind}") from error
        index, about = hot_index(placement, project.spec, kind)
        powerinfer.write(folder / f"{name}.generated.gpuidx", about, index)
        write_counts(folder / "activation", found.counts)
    increase = _increase(project, found, free, progress) if len(found.validation) else None
    size = (out / name).stat().st_size
    return ExportResult(out / name, size, before, after, increase, int(placement.hot.sum()))


def bias_free(
    project: Project, found: NeuronProfile, bank: PredictorBank, progress: Progress
) -> tuple[PredictorBank, Quality, Quality]:
    """The bank without biases, and the quality before and after."""
    train, validation = split_documents(found.documents, seed=0)
    free, counts = [], []
    with progress("predictors", len(bank.predictors), "layer") as advance:
        for layer, predictor in enumerate(bank.predictors):
            inputs, weights = found.inputs[layer], project.ffn_weights(layer).float()
            free.append(without_biases(predictor, constant_direction(inputs, train)))
            counts.append([counted(each, weights, inputs, validation) for each in (predictor, free[-1])])
            advance(1)
    made = PredictorBank(tuple(free))
    before, after = (
        Quality.of("all", sum(p.rank for p in each.predictors), sum(each.bytes_per_layer), overall_counts(of_each))
        for each, of_each in zip((bank, made), zip(*counts, strict=True), strict=True)
    )
    return made, before, after


def _increase(project: Project, found: NeuronProfile, bank: PredictorBank, progress: Progress) -> float:
    """Perplexity with `bank` over dense, as a share, on the profile's validation windows."""
    with progress("quality", 2, "trial") as advance:
        dense = project.validation_perplexity(found, None)
        advance(1)
        increase = project.validation_perplexity(found, bank) / dense - 1
        advance(1)
    return increase


def write_counts(folder: Path, counts: np.ndarray) -> None:
    """Firings int64 [n_layers, d_ff], each layer in a file of its own that `torch.load` reads."""
    folder.mkdir()
    for layer, of_layer in enumerate(padded(counts, 1)):
        torch.save(torch.from_numpy(of_layer.copy()), folder / f"activation_{layer}.pt")


def hot_index(placement: Placement, spec: ModelSpec, kind: FileType) -> tuple[list[Tensor], dict[str, Any]]:
    """For each layer which neurons are hot, as flags and as ascending ids; and the bytes that these take."""
    size, tensors, total = padded_size(spec.d_ff), [], 0
    for layer, hot in enumerate(placement.hot.tolist()):
        # A layer that is hot as a whole is that with the neurons that only fill it up.
        ids = np.arange(size) if hot == spec.d_ff else np.sort(placement.order[layer, :hot])
        flags = np.zeros(size, np.int32)
        flags[ids] = 1
        total += len(ids)
        for name, values in (("gpu_idx", flags), ("gpu_bucket", ids.astype(np.int32))):
            tensors.append(Tensor(f"blk.{layer}.{name}", values.shape, "i32", partial(np.asarray, values)))
    neuron = spec.rows_per_neuron * powerinfer.stored_bytes(kind, spec.d_model)
    return tensors, {
        "general.architecture": "generic.gpu_index",
        "generic.gpu_index.block_count": spec.n_layers,
        "split.vram_capacity": np.uint64(total * neuron),
    }
