"""A model's artefacts on disk: where they are, whether they are there, and whether they fit together.

Each artefact names what it was made from: the profile its corpus and settings, the predictors their profile, the
placement its profile and predictors. `*_key` is that identity, so a step is skipped only when its inputs are the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from profiler.spec import ModelSpec


@dataclass(frozen=True)
class Bundle:
    """The folder that holds one model's artefacts."""

    path: Path

    @classmethod
    def default_for(cls, model: Path, spec: ModelSpec) -> Bundle:
        """`<model>/hybrid`, or a folder in the user's cache where the model's folder cannot be written."""
        inside = model / "hybrid"
        if inside.is_dir() or os.access(model, os.W_OK):
            return cls(inside)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(cache / "hybrid" / spec.fingerprint)

    @property
    def profile(self) -> Path:
        return self.path / "profile.safetensors"

    @property
    def partial_profile(self) -> Path:
        return self.path / "profile.partial.safetensors"

    @property
    def predictors(self) -> Path:
        return self.path / "predictors.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "predictors.json"

    @property
    def hardware(self) -> Path:
        return self.path / "hardware.json"

    @property
    def placement(self) -> Path:
        return self.path / "placement.safetensors"
