"""`NeuronProfile`: how often each neuron fired over a calibration corpus, and a bounded sample of FFN inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiler.common.artifact import ArtifactHeader, read_tensors, write_tensors
from profiler.common.errors import ArtifactError
from profiler.common.spec import ModelSpec

KIND = "neuron profile"
REPAIR = "hybrid profile"


@dataclass(frozen=True)
class NeuronProfile:
    """Firing counts and sampled inputs of every FFN layer.

    counts: int64 [n_layers, d_ff], tokens on which each neuron fired; tokens: how many were seen; inputs: f16
    [n_layers, s, d_model], what the FFN read (after its norm) at s sampled tokens; documents: int32 [s], which document
    each came from; validation: int32 [n, window], windows of other documents' tokens, to measure quality on. `header`
    says which model and which corpus.
    """

    header: ArtifactHeader
    counts: np.ndarray
    tokens: int
    inputs: np.ndarray
    documents: np.ndarray
    validation: np.ndarray

    def frequency(self) -> np.ndarray:
        """Activation frequency of every neuron: float64 [n_layers, d_ff], 0 to 1."""
        return self.counts / max(1, self.tokens)

    def share_firing(self) -> np.ndarray:
        """Mean share of neurons that fire for a token, per layer: float64 [n_layers]."""
        return self.frequency().mean(axis=1)

    def coverage(self, share: float) -> float:
        """The share of all firings that the hottest `share` of all neurons make."""
        ordered = np.sort(self.counts, axis=None)[::-1]
        return float(ordered[: round(share * ordered.size)].sum() / max(1, ordered.sum()))

    def layer_coverage(self, share: float) -> np.ndarray:
        """As `coverage`, within each layer: float64 [n_layers]."""
        ordered = np.sort(self.counts, axis=1)[:, ::-1]
        hottest = ordered[:, : round(share * ordered.shape[1])].sum(axis=1)
        return hottest / np.maximum(1, ordered.sum(axis=1))

    def save(self, path: Path) -> None:
        """Write the profile, atomically; raises `ArtifactError` when it cannot be written."""
        tensors = {"counts": self.counts, "inputs": self.inputs, "documents": self.documents}
        tensors["validation"] = self.validation
        write_tensors(path, self.header, tensors | {"tokens": np.array([self.tokens])})

    @classmethod
    def load(cls, path: Path, spec: ModelSpec | None, repair: str = REPAIR) -> NeuronProfile:
        """Read a profile and check that it is of `spec`. Raises `ArtifactError` or `ArtifactMismatchError`."""
        header, tensors = read_tensors(path, KIND, spec.fingerprint if spec else None, repair)
        try:
            names = ("inputs", "documents", "validation")
            profile = cls(header, tensors["counts"], int(tensors["tokens"][0]), *(tensors[name] for name in names))
            shapes_fit = len(profile.counts) == len(profile.inputs) and profile.inputs.shape[1] == len(
                profile.documents
            )
        except (KeyError, IndexError) as error:
            raise ArtifactError(f"{path} lacks {error}; rebuild it with: {repair}") from error
        if not shapes_fit or (spec and profile.counts.shape != (spec.n_layers, spec.d_ff)):
            raise ArtifactError(f"{path} has counts of shape {profile.counts.shape}; rebuild it with: {repair}")
        return profile

    @staticmethod
    def make_header(spec: ModelSpec, made_from: dict[str, Any]) -> ArtifactHeader:
        return ArtifactHeader(KIND, spec.fingerprint, made_from)
