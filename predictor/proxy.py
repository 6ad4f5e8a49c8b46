"""`ProxyBank`: by what the neurons of a model are named whose activation is never 0; and its file.

A neuron's score for a token is how far it would move the layer's output, |act(gate~ . x) * (up~ . x)| times the length
of its row of down, computed from copies of gate and up in 4 bits (`row_copies.py`). Those whose score reaches their
layer's threshold are computed with the weights themselves, the others are left out. (The rule is that of Prox, 2026,
with down's lengths.) Copies come from the weights alone and are a file of their own; thresholds, and how often each
neuron reached them, come from a profile's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from cpu_kernels.activations import activate_ref, activate_up_ref
from cpu_kernels.matrix import Matrix
from predictor.report import PredictorReport
from predictor.row_copies import CopyForm, LayerCopies, RowCopies
from predictor.samples import FFNWeights
from profiler.common.artifact import ArtifactHeader, open_artifact, write_tensors
from profiler.common.errors import ArtifactError
from profiler.common.spec import ModelSpec

KIND = "proxy thresholds"
REPAIR = "hybrid train"
_TYPES = {"lengths": np.float32, "thresholds": np.float32, "counts": np.int64}


def proxy_form(spec: ModelSpec) -> CopyForm:
    """Which rows the strategy `proxy` reads copies of: gate and up in 4 bits, 19% of the FFN's bytes in bf16."""
    return CopyForm(("gate", "up") if spec.gated else ("up",), "int4")


@dataclass(frozen=True, eq=False)
class LayerProxy:
    """One layer's copies, lengths of its rows of down f32 [f], and the threshold on scores."""

    copies: LayerCopies
    lengths: np.ndarray
    threshold: float

    @property
    def nbytes(self) -> int:
        """Bytes that naming one token's neurons reads."""
        return self.copies.nbytes + self.lengths.nbytes

    def reordered(self, order: np.ndarray) -> LayerProxy:
        """The proxy of the same layer with its neurons permuted: new neuron i is old neuron order[i]."""
        return replace(self, copies=self.copies.reordered(order), lengths=self.lengths[order])

    def scores(self, weights: FFNWeights, x: torch.Tensor) -> torch.Tensor:
        """The scores f32 [t, f] for x f32 [t, d]; of `weights`, the layer's, only biases are used."""

        def product(copy: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
            return linear(x, copy.widen(), bias)

        copies, name = self.copies, weights.activation
        assert copies.up is not None
        up = product(copies.up, weights.up_bias)
        if copies.gate is None:
            found = activate_ref(name, up)
        else:
            found = activate_ref(name, product(copies.gate, weights.gate_bias)).mul_(activate_up_ref(name, up))
        return found.abs_().mul_(torch.from_numpy(self.lengths))


@dataclass(frozen=True, eq=False)
class ProxyBank:
    """The proxies of all layers.

    lengths: f32 [n_layers, d_ff] of the rows of down; thresholds: f32 [n_layers]; counts: int64 [n_layers, d_ff], for
    how many of `tokens` sampled tokens each neuron passed. `header` and `report`: of the file it was read from; of the
    report's qualities a neuron counts as firing always, as predicted where it passes.
    """

    copies: RowCopies
    lengths: np.ndarray
    thresholds: np.ndarray
    counts: np.ndarray
    tokens: int
    report: PredictorReport | None = None
    header: ArtifactHeader | None = None

    def layer(self, number: int) -> LayerProxy:
        return LayerProxy(self.copies.layers[number], self.lengths[number], float(self.thresholds[number]))

    @property
    def bytes_per_layer(self) -> tuple[int, ...]:
        return tuple(self.layer(number).nbytes for number in range(len(self.lengths)))

    def with_thresholds(self, thresholds: Sequence[float]) -> ProxyBank:
        """The same with other thresholds, one a layer; counts stay those of the present ones."""
        return replace(self, thresholds=np.array(thresholds, np.float32))

    def frequency(self) -> np.ndarray:
        """How often each neuron passed: float64 [n_layers, d_ff], 0 to 1."""
        return self.counts / self.tokens

    def save(self, path: Path, spec: ModelSpec, made_from: dict[str, Any]) -> None:
        """Write all but the copies, atomically. Raises `ArtifactError` when it cannot be written."""
        tensors = {name: getattr(self, name) for name in _TYPES} | {"tokens": np.array([self.tokens])}
        if self.report is not None:
            tensors["report"] = np.frombuffer(self.report.to_json().encode(), np.uint8)
        write_tensors(path, ArtifactHeader(KIND, spec.fingerprint, made_from), tensors)

    @classmethod
    def load(cls, path: Path, copies: Path, spec: ModelSpec, repair: str = REPAIR) -> ProxyBank:
        """Read the thresholds at `path` and the copies at `copies`, and check that they are of `spec`. Raises
        `ArtifactError` or `ArtifactMismatchError`."""
        with open_artifact(path, KIND, spec.fingerprint, repair) as file:
            arrays = {name: file.array(name) for name in (*_TYPES, "tokens")}
            report = file.array("report").tobytes() if "report" in file.places else None
            header = file.header
        if problem := _problem(arrays, spec):
            raise ArtifactError(f"{path} is corrupt: {problem}; rebuild it with: {repair}")
        try:
            read = None if report is None else PredictorReport.from_json(report.decode())
        except (ArtifactError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is corrupt: {error}; rebuild it with: {repair}") from error
        tokens = int(arrays.pop("tokens")[0])
        found = RowCopies.load(copies, spec, proxy_form(spec), repair)
        return cls(found, **arrays, tokens=tokens, report=read, header=header)


def _problem(arrays: dict[str, np.ndarray], spec: ModelSpec) -> str | None:
    """What is wrong with the tensors of a proxy of `spec`, or None."""
    shapes: dict[str, tuple[int, ...]] = {"thresholds": (spec.n_layers,), "tokens": (1,)}
    shapes |= dict.fromkeys(("lengths", "counts"), (spec.n_layers, spec.d_ff))
    for name, shape in shapes.items():
        array, dtype = arrays[name], np.dtype(_TYPES.get(name, np.int64))
        if array.shape != shape or array.dtype != dtype:
            return f"its {name} are {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"
    if not all(np.isfinite(arrays[name]).all() and (arrays[name] >= 0).all() for name in ("lengths", "thresholds")):
        return "it has lengths or thresholds that are not numbers from 0 on"
    tokens, counts = int(arrays["tokens"][0]), arrays["counts"]
    if tokens < 1 or counts.min(initial=0) < 0 or counts.max(initial=0) > tokens:
        return f"it counts {counts.min(initial=0)} to {counts.max(initial=0)} of {tokens} tokens"
    return None
