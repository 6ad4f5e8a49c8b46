"""`NeuronProfile`: how often each neuron fired over a calibration corpus, and a bounded sample of FFN inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from profiler.common.artifact import ArtifactHeader, open_artifact, write_tensors
from profiler.common.errors import ArtifactError, InputError
from profiler.common.spec import ModelSpec

KIND = "neuron profile"
REPAIR = "hybrid profile"
IMPORTED = "imported"  # in what an artefact was made from: which file it came with
_SAMPLES = ("inputs", "documents", "validation")
_TYPES = {"counts": np.int64, "inputs": np.float16, "documents": np.int32, "validation": np.int32}


@dataclass(frozen=True)
class NeuronProfile:
    """Firing counts and sampled inputs of every FFN layer.

    counts: int64 [n_layers, d_ff], tokens on which each neuron fired; tokens: how many were seen; inputs: f16
    [n_layers, s, d_model], what the FFN read (after its norm) at s sampled tokens; documents: int32 [s], which document
    each came from; validation: int32 [n, window], windows of other documents' tokens, to measure quality on. `header`
    says which model and which corpus. Raises `InputError` for values that no profile has.
    """

    header: ArtifactHeader
    counts: np.ndarray
    tokens: int
    inputs: np.ndarray
    documents: np.ndarray
    validation: np.ndarray

    def __post_init__(self) -> None:
        for name, axes in (("counts", 2), ("inputs", 3), ("documents", 1), ("validation", 2)):
            array = getattr(self, name)
            if array.ndim != axes or array.dtype != _TYPES[name]:
                raise InputError(
                    f"a profile's {name} are {array.dtype} {list(array.shape)}, expected "
                    f"{np.dtype(_TYPES[name])} of {axes} axes"
                )
        if self.inputs.shape[:2] != (len(self.counts), len(self.documents)):
            raise InputError(
                f"a profile has inputs of {list(self.inputs.shape)} for counts of {len(self.counts)} layers and "
                f"{len(self.documents)} sampled tokens"
            )
        if self.tokens < 1 or self.counts.min(initial=0) < 0 or self.counts.max(initial=0) > self.tokens:
            raise InputError(
                f"a profile of {self.tokens} tokens counts {self.counts.min(initial=0)} to "
                f"{self.counts.max(initial=0)} firings of a neuron, expected 0 to the tokens"
            )
        if self.documents.min(initial=0) < 0 or self.validation.min(initial=0) < 0:
            raise InputError("a profile names documents and token ids by numbers from 0 on, found negative ones")
        for layer, inputs in enumerate(self.inputs):
            check_inputs(layer, inputs)

    @property
    def is_imported(self) -> bool:
        """Whether the counts came with the model: then there are no samples."""
        return IMPORTED in self.header.made_from

    def frequency(self) -> np.ndarray:
        """Activation frequency of every neuron: float64 [n_layers, d_ff], 0 to 1."""
        return self.counts / self.tokens

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

    def without_samples(self) -> NeuronProfile:
        """The counts alone, which is all that placing needs: the samples are hundreds of MB."""
        return replace(
            self, inputs=self.inputs[:, :0], documents=self.documents[:0], validation=self.validation[:0, :0]
        )

    def save(self, path: Path) -> None:
        """Write the profile, atomically; raises `ArtifactError` when it cannot be written."""
        tensors = {name: getattr(self, name) for name in _TYPES}
        write_tensors(path, self.header, tensors | {"tokens": np.array([self.tokens])})

    @classmethod
    def load(cls, path: Path, spec: ModelSpec | None, repair: str = REPAIR, samples: bool = True) -> NeuronProfile:
        """Read a profile and check that it is of `spec`; without `samples` only its counts.

        Raises `ArtifactError` or `ArtifactMismatchError`.
        """
        with open_artifact(path, KIND, spec.fingerprint if spec else None, repair) as file:
            tokens = file.array("tokens")
            arrays = {name: file.array(name) for name in _TYPES if samples or name not in _SAMPLES}
            header = file.header
        if not samples:
            empty = {"inputs": (len(arrays["counts"]), 0, 0), "documents": (0,), "validation": (0, 0)}
            arrays |= {name: np.empty(shape, _TYPES[name]) for name, shape in empty.items()}
        try:
            if tokens.shape != (1,) or tokens.dtype != np.int64:
                raise InputError(f"a profile's count of tokens is {tokens.dtype} {list(tokens.shape)}")
            found = cls(header, tokens=int(tokens[0]), **arrays)
            if spec is not None:
                found._check_spec(spec)
        except InputError as error:
            raise ArtifactError(f"{path} is corrupt: {error}; rebuild it with: {repair}") from error
        return found

    def _check_spec(self, spec: ModelSpec) -> None:
        """Raise `InputError` for sizes or token ids that are not those of `spec`."""
        if self.counts.shape != (spec.n_layers, spec.d_ff):
            raise InputError(f"it has counts of shape {self.counts.shape}, expected {(spec.n_layers, spec.d_ff)}")
        if self.inputs.size and self.inputs.shape[2] != spec.d_model:
            raise InputError(f"it has inputs of width {self.inputs.shape[2]}, expected {spec.d_model}")
        if self.validation.max(initial=0) >= spec.vocab_size:
            raise InputError(f"it has token id {self.validation.max()}, this model has {spec.vocab_size}")

    @staticmethod
    def make_header(spec: ModelSpec, made_from: dict[str, Any]) -> ArtifactHeader:
        return ArtifactHeader(KIND, spec.fingerprint, made_from)


def check_inputs(layer: int, inputs: np.ndarray) -> None:
    """Raise `InputError` unless a layer's sampled inputs, f16, are all numbers."""
    if not np.isfinite(inputs).all():
        raise InputError(f"a profile's inputs of layer {layer} are not all finite")


@dataclass(frozen=True)
class StoredInputs:
    """The sampled FFN inputs of a stored profile, a layer at a time: those of a 7B model are 512 MiB."""

    path: Path
    repair: str
    _inputs: np.memmap

    @classmethod
    def open(cls, path: Path, spec: ModelSpec, repair: str = REPAIR) -> StoredInputs:
        """Open the profile at `path` and hold all of it against its digests.

        Raises `ArtifactError` or `ArtifactMismatchError`, also for a profile that kept no inputs.
        """
        with open_artifact(path, KIND, spec.fingerprint, repair) as file:
            file.check()
            place = file.place("inputs")
            fits = len(place.shape) == 3 and (place.shape[0], place.shape[2]) == (spec.n_layers, spec.d_model)
            if place.dtype != "F16" or not fits or not place.shape[1]:
                raise ArtifactError(f"{path} holds no FFN inputs of this model; make them with: {repair}")
            return cls(path, repair, np.memmap(file.file, np.float16, "r", place.start, place.shape))

    @property
    def count(self) -> int:
        """Inputs of each layer, at least 1."""
        return int(self._inputs.shape[1])

    def layer(self, number: int, step: int = 1) -> np.ndarray:
        """Every `step`-th input of a layer, f16 [s, d_model]. Raises `ArtifactError` where one is not finite."""
        found = self._inputs[number, ::step]
        try:
            check_inputs(number, found)
        except InputError as error:
            raise ArtifactError(f"{self.path} is corrupt: {error}; rebuild it with: {self.repair}") from error
        return found
