"""What can be said of models' and other folders before anything that reads or writes them is imported."""

from __future__ import annotations

import os
from pathlib import Path

from hybrid.errors import ArtifactError, ModelError

GGUF_MAGIC, POWERINFER_MAGIC = b"GGUF", b"PWRI"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that is named as a GGUF file or begins as one."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) in (GGUF_MAGIC, POWERINFER_MAGIC)


def require_model(path: Path) -> None:
    """Raise `ModelError` unless `path` is a folder or a GGUF file."""
    try:
        if path.is_dir() or is_gguf(path):
            return
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    problem = "is neither a folder nor a GGUF file" if path.exists() else "does not exist"
    raise ModelError(f"model {path} {problem}; give a Hugging Face model folder or a GGUF file (nothing is downloaded)")


def require_writable(folder: Path) -> None:
    """Raise `ArtifactError` unless `folder` can be written, or made: before the work whose result goes there."""
    found = folder.absolute()
    while not os.path.lexists(found):
        found = found.parent
    if not os.access(found, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write {folder}; choose another folder")
