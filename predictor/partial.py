"""Training that was interrupted: what it had done, in a file that a later run of the same training goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from predictor.low_rank import LowRankPredictor
from profiler.common.artifact import ArtifactHeader, read_tensors, write_tensors
from profiler.common.errors import InputError
from profiler.common.spec import ModelSpec

_KIND = "partial predictors"
_SAVE_SECONDS = 300.0  # what a killed run loses at most
_PARTS = tuple(part.name for part in fields(LowRankPredictor) if part.name != "threshold")


@dataclass
class TrainingState:
    """What is done, each for the first layers: the predicted share at every candidate rank, and trained predictors.

    `path` is where it is kept, if anywhere, and `header` says of which training it is.
    """

    path: Path | None = None
    header: ArtifactHeader | None = None
    shares: list[list[float]] = field(default_factory=list)
    predictors: list[LowRankPredictor] = field(default_factory=list)
    _saved: float = field(default_factory=monotonic)

    @classmethod
    def of(cls, path: Path, spec: ModelSpec, made_from: dict[str, Any]) -> TrainingState:
        """What `path` holds of the training that predictors `made_from` this come from; else one that is to begin.

        The caller removes the file once the predictors are safe.
        """
        header = ArtifactHeader(_KIND, spec.fingerprint, made_from)
        try:
            found, tensors = read_tensors(path, _KIND, spec.fingerprint, "hybrid train")
            if found == header:
                return cls(path, header, tensors["shares"].tolist(), _predictors(tensors))
        except (InputError, KeyError):
            pass  # missing, of another model, or damaged: it only saves time, and is written anew
        return cls(path, header)

    def save(self) -> bool:
        """Write what there is; returns whether it is kept. Raises `ArtifactError` when the file cannot be written."""
        if self.path is None or self.header is None or not self.shares:
            return False
        tensors = {
            f"layers.{layer}.{part}": getattr(predictor, part).numpy()
            for layer, predictor in enumerate(self.predictors)
            for part in _PARTS
        }
        tensors["layers"], tensors["shares"] = np.array([len(self.predictors)]), np.array(self.shares, np.float64)
        write_tensors(self.path, self.header, tensors)
        self._saved = monotonic()
        return True

    def layer_is_done(self) -> None:
        """Save now and then."""
        if monotonic() - self._saved > _SAVE_SECONDS:
            self.save()


def _predictors(tensors: dict[str, np.ndarray]) -> list[LowRankPredictor]:
    found = []
    for layer in range(int(tensors["layers"][0])):
        parts: dict[str, Any] = {part: torch.from_numpy(tensors[f"layers.{layer}.{part}"]) for part in _PARTS}
        found.append(LowRankPredictor(**parts))
    return found
