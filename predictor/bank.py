"""`PredictorBank`: the predictors of all layers, and their file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from predictor.low_rank import LowRankPredictor
from predictor.report import PredictorReport
from profiler.common.artifact import ArtifactHeader, read_tensors, write_tensors
from profiler.common.errors import ArtifactError
from profiler.common.spec import ModelSpec

KIND = "predictors"
REPAIR = "hybrid train"
_FIELDS = {
    "fc1": torch.int8,
    "fc1_scale": torch.float32,
    "b1": torch.float32,
    "fc2": torch.int8,
    "fc2_scale": torch.float32,
    "b2": torch.float32,
}


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

    def save(self, path: Path, spec: ModelSpec, made_from: dict[str, Any], report: PredictorReport) -> None:
        """Write the bank, atomically; raises `ArtifactError` when it cannot be written."""
        tensors = {
            f"layers.{layer}.{name}": getattr(predictor, name).numpy()
            for layer, predictor in enumerate(self.predictors)
            for name in _FIELDS
        }
        tensors["thresholds"] = np.array(self.thresholds, np.float32)
        tensors["report"] = np.frombuffer(report.to_json().encode(), np.uint8)
        write_tensors(path, ArtifactHeader(KIND, spec.fingerprint, made_from), tensors)

    @classmethod
    def load(cls, path: Path, spec: ModelSpec, repair: str = REPAIR) -> PredictorBank:
        """Read a bank and check that it is of `spec`. Raises `ArtifactError` or `ArtifactMismatchError`."""
        header, tensors = read_tensors(path, KIND, spec.fingerprint, repair)
        try:
            thresholds = tensors["thresholds"]
            predictors = tuple(
                _predictor(tensors, layer, float(thresholds[layer]), spec) for layer in range(spec.n_layers)
            )
            report = PredictorReport.from_json(tensors["report"].tobytes().decode())
        except (KeyError, IndexError, ValueError) as error:
            raise ArtifactError(f"{path} is not whole ({error}); rebuild it with: {repair}") from error
        return cls(predictors, header, report)


def _predictor(tensors: dict[str, np.ndarray], layer: int, threshold: float, spec: ModelSpec) -> LowRankPredictor:
    """One layer's predictor; raises `KeyError` or `ValueError` where a tensor is missing or not as expected."""
    parts = {name: torch.from_numpy(tensors[f"layers.{layer}.{name}"]) for name in _FIELDS}
    rank = len(parts["b1"])
    shapes = {"fc1": (rank, spec.d_model), "fc2": (spec.d_ff, rank), "fc2_scale": (spec.d_ff,), "b2": (spec.d_ff,)}
    for name, tensor in parts.items():
        if tensor.dtype != _FIELDS[name] or tuple(tensor.shape) != shapes.get(name, (rank,)):
            raise ValueError(f"layers.{layer}.{name} is {tensor.dtype} {list(tensor.shape)}")
    return LowRankPredictor(**parts, threshold=threshold)
