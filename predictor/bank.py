"""`PredictorBank`: the predictors of all layers, and their file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from predictor.low_rank import LowRankPredictor
from predictor.report import PredictorReport
from profiler.common.artifact import ArtifactFile, ArtifactHeader, open_artifact, write_tensors
from profiler.common.errors import ArtifactError, InputError
from profiler.common.spec import ModelSpec

KIND = "predictors"
REPAIR = "hybrid train"
_FIELDS = ("fc1", "fc1_scale", "b1", "fc2", "fc2_scale", "b2")


@dataclass(frozen=True, eq=False)
class PredictorBank:
    """One predictor per layer; ranks may differ. `header` and `report` are those of the file it was read from."""

    predictors: tuple[LowRankPredictor, ...]
    header: ArtifactHeader | None = None
    report: PredictorReport | None = None

    @property
    def bytes_per_layer(self) -> tuple[int, ...]:
        return tuple(predictor.nbytes for predictor in self.predictors)

    @property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(predictor.threshold for predictor in self.predictors)

    def with_thresholds(self, thresholds: Sequence[float]) -> PredictorBank:
        """The same predictors with one logit threshold per layer; the weights are shared."""
        pairs = zip(self.predictors, thresholds, strict=True)
        return replace(self, predictors=tuple(predictor.with_threshold(value) for predictor, value in pairs))

    def save(self, path: Path, spec: ModelSpec, made_from: dict[str, Any], report: PredictorReport | None) -> None:
        """Write the bank, atomically; `report` may be missing. Raises `ArtifactError` when it cannot be written."""
        tensors = {
            f"layers.{layer}.{name}": getattr(predictor, name).numpy()
            for layer, predictor in enumerate(self.predictors)
            for name in _FIELDS
        }
        tensors["thresholds"] = np.array(self.thresholds, np.float32)
        if report is not None:
            tensors["report"] = np.frombuffer(report.to_json().encode(), np.uint8)
        write_tensors(path, ArtifactHeader(KIND, spec.fingerprint, made_from), tensors)

    @classmethod
    def load(cls, path: Path, spec: ModelSpec, repair: str = REPAIR) -> PredictorBank:
        """Read a bank and check that it is of `spec`. Raises `ArtifactError` or `ArtifactMismatchError`."""
        with open_bank(path, spec, repair) as bank:
            predictors = tuple(bank.predictor(layer) for layer in range(spec.n_layers))
            return cls(predictors, bank.file.header, bank.report())


@dataclass(frozen=True, eq=False)
class StoredBank:
    """An open bank of `spec`, whose predictors are read one at a time. Methods raise `ArtifactError` for damage."""

    file: ArtifactFile
    spec: ModelSpec

    @cached_property
    def thresholds(self) -> np.ndarray:
        """f32 [n_layers], on the logits."""
        found = self.file.array("thresholds")
        if found.dtype != np.float32 or found.shape != (self.spec.n_layers,):
            self._refuse(f"its thresholds are {found.dtype} {list(found.shape)}, this model has {self.spec.n_layers}")
        return found

    def predictor(self, layer: int) -> LowRankPredictor:
        """One layer's."""
        parts = {name: torch.from_numpy(self.file.array(f"layers.{layer}.{name}")) for name in _FIELDS}
        try:
            found = LowRankPredictor(**parts, threshold=float(self.thresholds[layer]))
        except InputError as error:
            self._refuse(f"layer {layer}: {error}")
        if found.fc1.shape[1] != self.spec.d_model or len(found.b2) != self.spec.d_ff:
            self._refuse(f"layer {layer} predicts {len(found.b2)} neurons from {found.fc1.shape[1]} inputs")
        return found

    def report(self) -> PredictorReport | None:
        """The report that was written with the predictors; none where they came without."""
        if "report" not in self.file.places:
            return None
        try:
            found = PredictorReport.from_json(self.file.array("report").tobytes().decode())
        except (ArtifactError, UnicodeDecodeError) as error:
            self._refuse(str(error))
        layers = {self.spec.n_layers, len(found.layers), *(len(point.thresholds) for point in found.curve)}
        if len(layers) > 1:
            self._refuse(f"its report is of {len(found.layers)} layers and a curve, not all of {self.spec.n_layers}")
        return found

    def _refuse(self, problem: str) -> NoReturn:
        raise ArtifactError(f"{self.file.path} is corrupt: {problem}; rebuild it with: {self.file.repair}")


@contextmanager
def open_bank(path: Path, spec: ModelSpec, repair: str = REPAIR) -> Iterator[StoredBank]:
    """Open the bank at `path`. Raises `ArtifactError`, or `ArtifactMismatchError` for one that is not of `spec`."""
    with open_artifact(path, KIND, spec.fingerprint, repair) as file:
        yield StoredBank(file, spec)
