"""What can be said of folders before anything that reads or writes them is imported."""

from __future__ import annotations

import os
from pathlib import Path

from hybrid.errors import ArtifactError, ModelError


def require_folder(path: Path) -> None:
    """Raise `ModelError` unless `path` is a folder."""
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise ModelError(f"model folder {path} {problem}; give a Hugging Face model folder (nothing is downloaded)")


def require_writable(folder: Path) -> None:
    """Raise `ArtifactError` unless `folder` can be written, or made: before the work whose result goes there."""
    found = folder.absolute()
    while not os.path.lexists(found):
        found = found.parent
    if not os.access(found, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {folder}; choose another folder")
