"""Certificates of a model's neurons: made, written, and whether they are worth more than its predictors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cpu_kernels.certificate import CertificateView, name_tokens
from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import InputError
from hybrid.formats.folder import require_writable
from hybrid.formats.packed import PackedModel
from hybrid.offline.project import Project
from placement.placement import PlacementResult
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.row_copies import KIND, CopiedPart, CopyForm, LayerCopies, write_copies
from profiler.common.artifact import ArtifactHeader
from profiler.common.progress import Progress
from profiler.profile import NeuronProfile

# Of a profile's samples, and layers of the model, by which the silent neurons that are named are counted.
_TRIED_TOKENS, _TRIED_LAYERS = 128, 4
# What a loss of perplexity costs, in time: models of one kind lose some 0.076 nats with each natural logarithm of their
# size (Kaplan et al. 2020), so one that is worse by 1% might be smaller, and as much faster, by 13%.
_PRICE_OF_LOSS = 13.0


def require_certifiable(project: Project) -> None:
    """Raise `InputError` where no neuron can be certified, or nothing is won by it."""
    project.require_sparse()
    if not project.spec.certifiable:
        raise InputError(
            f"rows of {project.spec.dtype} are no longer than a copy in 8 bits: there is nothing to certify; "
            "sparsity exact loses nothing and reads as little"
        )


def certify(project: Project, progress: Progress, doubt: dict[str, Any] | None = None) -> ArtifactHeader:
    """Make and write the copies of rows that decide, in the checkpoint's order, and return what was written.

    doubt: what `uncertainty` says, where it was asked already. Raises `InputError` as
    `require_certifiable` does, `ArtifactError` when the file cannot be written.
    """
    require_certifiable(project)
    require_writable(project.bundle.path)
    spec, path = project.spec, project.bundle.copies
    form, made_from = (
        CopyForm.certified(spec),
        {"dtype": spec.dtype, **(uncertainty(project) if doubt is None else doubt)},
    )
    with progress("certify", spec.n_layers, "layer") as advance:
        layers = (_copies(project, form, layer) for layer in range(spec.n_layers))
        write_copies(path, spec, form, made_from, layers, advance)
    return ArtifactHeader(KIND, spec.fingerprint, made_from)


def uncertainty(project: Project) -> dict[str, Any]:
    """Which share of silent neurons copies would leave in doubt, by which profile's samples; without one nothing."""
    if not project.bundle.profile.is_file():
        return {}
    profile = project.load_profile()
    if not profile.inputs.size:  # counts that came with a file have no samples
        return {}
    return {"profile": profile.header.key, "uncertain": _uncertain(project, profile, CopyForm.certified(project.spec))}


def is_worth_more(certified: PlacementResult, learned: PlacementResult, bank: PredictorBank | ProxyBank | None) -> bool:
    """Whether certificates are faster than `exact`, where `bank` is None, or as fast as predictors, whose loss counts
    as time. Where that is not known, as of predictors that came with a file, it is for the user to say."""
    if bank is None:
        return certified.solution.seconds < learned.solution.seconds
    loss = None if bank.report is None else bank.report.perplexity_increase
    if loss is None:
        return False
    return certified.solution.seconds <= learned.solution.seconds * (1 + _PRICE_OF_LOSS * max(0.0, loss))


def _copies(project: Project, form: CopyForm, layer: int) -> LayerCopies:
    threads = project.runtime.pool.threads
    return form.layer({part: _rows(project, part, layer) for part in form.parts}, threads)


def _rows(project: Project, part: CopiedPart, layer: int) -> np.ndarray:
    """The rows of a matrix as f32 [f, d], in the checkpoint's order."""
    packed, spec = project.folder.weights, project.spec
    if isinstance(packed, PackedModel):
        found = np.empty((spec.d_ff, spec.d_model), np.float32)
        found[packed.order[layer]] = packed.matrix(f"layers.{layer}.{part}", spec.d_ff, spec.d_model).widen().numpy()
        return found
    tensors = project.folder.ffn_tensors(layer)
    rows = tensors.gate if part == "gate" else tensors.up
    assert rows is not None
    return rows.float().contiguous().numpy()


def _uncertain(project: Project, profile: NeuronProfile, form: CopyForm) -> float:
    """Share of silent neurons that are named, over some samples and layers."""
    layers = np.unique(np.linspace(0, project.spec.n_layers - 1, _TRIED_LAYERS).astype(int))
    counts = sum(_silent(project, profile, layer, _copies(project, form, layer)) for layer in layers.tolist())
    named, silent = np.asarray(counts).tolist()
    return float(named / max(1.0, silent))


def _silent(project: Project, profile: NeuronProfile, layer: int, copies: LayerCopies) -> np.ndarray:
    """Of a layer's neurons, over some samples: how many are silent and named, and how many silent."""
    weights = project.ffn_weights(layer).float()
    x = np.ascontiguousarray(profile.inputs[layer][:_TRIED_TOKENS], np.float32)
    bias = weights.firing_bias.numpy()
    assert copies.slope is not None and copies.rest is not None
    view = CertificateView(
        copies.deciding.rows, copies.slope, copies.rest, bias, project.spec.activation, project.spec.d_model
    )
    ids, offsets = name_tokens(view, x, WorkerPool(1))
    named = np.zeros((len(x), len(bias)), bool)
    for token, row in enumerate(named):
        row[ids[offsets[token] : offsets[token + 1]]] = True
    with torch.inference_mode():
        z = torch.from_numpy(x) @ weights.firing_weight.T + weights.firing_bias
    silent = z.numpy() <= view.threshold
    return np.array([(named & silent).sum(), silent.sum()], float)
