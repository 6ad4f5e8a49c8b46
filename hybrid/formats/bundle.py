"""A model's artefacts on disk: where they are, how to remake them, and whether they fit together.

Each artefact names what it was made from by the key of that artefact's header: predictors their profile, a placement
its profile and predictors.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cpu_kernels.folders import user_cache
from hybrid.errors import ArtifactError
from hybrid.formats.gguf_file import stem_of
from placement import placement as placement_file
from placement.placement import Placement
from predictor import bank as predictor_bank
from predictor import proxy as proxy_file
from predictor import row_copies
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.row_copies import CopyForm, StoredCopies, open_copies
from profiler import profile as neuron_profile
from profiler.common.artifact import ArtifactHeader, read_header
from profiler.common.spec import ModelSpec
from profiler.profile import NeuronProfile

# The embedded model needs no path on the command line, and brings its own corpus.
EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "model"
EMBEDDED_CORPUS = EMBEDDED_MODEL.parent / "corpus"
_CLASSES: dict[str, type[NeuronProfile] | type[PredictorBank] | type[Placement]] = {
    neuron_profile.KIND: NeuronProfile, predictor_bank.KIND: PredictorBank, placement_file.KIND: Placement
}  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """The folder that holds one model's artefacts; `repair` is the command that makes what is missing or stale,
    `certify` the one that makes copies of rows."""

    path: Path
    repair: str = "hybrid prepare"
    certify: str = "hybrid certify"

    @classmethod
    def of(cls, model: Path, spec: ModelSpec, chosen: Path | None = None) -> Bundle:
        """`chosen`, or `<model>/hybrid`, or a folder in the user's cache where the model's cannot be written.

        A file `NAME.gguf` has `NAME.hybrid` beside it.

        For a user without a cache it is the model's all the same: there may be nothing to read in it, and a write says
        that it cannot be.
        """
        command, certify = "hybrid prepare", "hybrid certify"
        if model.resolve() != EMBEDDED_MODEL.resolve():
            command, certify = f"{command} {model} --corpus FILE...", f"{certify} {model}"
        if chosen is not None:
            return cls(chosen, f"{command} --bundle {chosen}", f"{certify} --bundle {chosen}")
        is_file = model.is_file()
        inside = model.parent / f"{stem_of(model)}.hybrid" if is_file else model / "hybrid"
        cache = user_cache()
        if inside.is_dir() or os.access(inside.parent, os.W_OK) or cache is None:
            return cls(inside, command, certify)
        return cls(cache / "hybrid" / spec.fingerprint, command, certify)

    @property
    def profile(self) -> Path:
        return self.path / "profile.safetensors"

    @property
    def partial_profile(self) -> Path:
        return self.path / "profile.partial.safetensors"

    @property
    def partial_own_text(self) -> Path:
        return self.path / "own-text.partial.safetensors"

    @property
    def predictors(self) -> Path:
        return self.path / "predictors.safetensors"

    @property
    def partial_predictors(self) -> Path:
        return self.path / "predictors.partial.safetensors"

    @property
    def proxy(self) -> Path:
        return self.path / "proxy.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "predictors.json"

    @property
    def hardware(self) -> Path:
        return self.path / "hardware.json"

    @property
    def copies(self) -> Path:
        return self.path / "copies.safetensors"

    @property
    def placement(self) -> Path:
        return self.path / "placement.safetensors"

    def load_profile(self, spec: ModelSpec, samples: bool = True) -> NeuronProfile:
        """The profile, or without `samples` its counts, which is all that placing needs.

        Raises `ArtifactError` or `ArtifactMismatchError`, naming the command that repairs it; so do the others.
        """
        return NeuronProfile.load(self.profile, spec, self.repair, samples)

    def load_predictors(self, spec: ModelSpec) -> PredictorBank:
        return PredictorBank.load(self.predictors, spec, self.repair)

    def load_placement(self, spec: ModelSpec) -> Placement:
        return Placement.load(self.placement, spec, self.repair)

    def open_copies(self, spec: ModelSpec) -> AbstractContextManager[StoredCopies]:
        """Copies of rows for the strategy `certified`. Raises as `load_profile`."""
        self.copies_header(spec)
        return open_copies(self.copies, spec, CopyForm.certified(spec), self.certify)

    def load_proxies(self, spec: ModelSpec) -> ProxyBank:
        """Copies of rows and thresholds for the strategy `proxy`. Raises as `load_profile`."""
        return ProxyBank.load(self.proxy, self.copies, spec, self.repair)

    def copies_header(self, spec: ModelSpec) -> ArtifactHeader:
        """Of certificates' copies. Raises as `load_profile`, and `ArtifactError` where they are of weights in another
        type, as those of a model are beside a packed one: their bounds are of other rows."""
        header = read_header(self.copies, row_copies.KIND, spec.fingerprint, self.certify)
        found = header.made_from.get("dtype")
        if found != spec.dtype:
            problem = f"{self.copies} has copies of weights in {found or 'another type'}, these are in {spec.dtype}"
            raise ArtifactError(f"{problem}; make them with: {self.certify}")
        return header

    def has_copies(self, spec: ModelSpec) -> bool:
        """Whether certificates are there, of this model's weights in this type."""
        try:
            self.copies_header(spec)
        except ArtifactError:
            return False
        return True

    def current(self, path: Path, kind: str, spec: ModelSpec) -> ArtifactHeader | None:
        """The header of the artefact at `path` if it is of this model and whole, which is to say that it loads."""
        try:
            _CLASSES[kind].load(path, spec, self.repair)
            return read_header(path, kind, spec.fingerprint, self.repair)
        except ArtifactError:
            return None

    def _header(self, path: Path, kind: str, spec: ModelSpec) -> ArtifactHeader | None:
        """The header of the artefact at `path` if that is whole and of this model; nothing else is read."""
        try:
            return read_header(path, kind, spec.fingerprint, self.repair)
        except ArtifactError:
            return None

    def stale(self, spec: ModelSpec) -> list[str]:
        """One line for each artefact that was made from another than the one that now lies beside it."""
        profile = self._header(self.profile, neuron_profile.KIND, spec)
        predictors = self._header(self.predictors, predictor_bank.KIND, spec)
        placement = self._header(self.placement, placement_file.KIND, spec)
        proxies = self._header(self.proxy, proxy_file.KIND, spec)
        lines = []
        for name, made, source, origin in (
            ("predictors", predictors, "profile", profile),
            ("placement", placement, "profile", profile),
            ("placement", placement, "predictors", predictors if spec.fires_sparsely else proxies),
            ("proxies", proxies, "profile", profile),
        ):
            used = made.made_from.get(source) if made else None
            if used and origin and used != origin.key:
                lines.append(f"the {name} were made from other {source} than the present; run: {self.repair}")
        return lines
