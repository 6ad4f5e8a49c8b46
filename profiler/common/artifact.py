"""Artefact files: safetensors or JSON with a header that says what they are, for which model, and from what made.

Nothing is reused because of its file name alone. A write goes to a temporary file in the same folder, is flushed
to disk and renamed, so a killed command leaves the old file or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from profiler.common.errors import ArtifactError, ArtifactMismatchError

FORMAT_VERSION = 1
_HEADER_KEY = "hybrid"


def package_version() -> str:
    """Version of the installed distribution, or `source` when run from a tree that was not installed."""
    try:
        return metadata.version("hybrid-inference")
    except metadata.PackageNotFoundError:
        return "source"


@dataclass(frozen=True)
class ArtifactHeader:
    """What an artefact is: its `kind`, the model it belongs to, and what made it (corpus hash, seed, settings)."""

    kind: str
    model_fingerprint: str
    made_from: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    package_version: str = field(default_factory=package_version)

    @property
    def key(self) -> str:
        """16 hex digits that identify what the artefact was made from; made again from the same, it is the same."""
        identity = json.dumps([self.kind, self.model_fingerprint, self.made_from], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def check(self, path: Path, kind: str, fingerprint: str | None, repair: str) -> None:
        """Raise unless this header is of `kind`, of a known format and, when given, of the model `fingerprint`."""
        if self.kind != kind:
            raise ArtifactError(f"{path} is a {self.kind}, expected a {kind}; run: {repair}")
        if self.format_version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {self.format_version}, this build reads up to {FORMAT_VERSION}; "
                f"upgrade hybrid, or rebuild the file with: {repair}"
            )
        if fingerprint is not None and self.model_fingerprint != fingerprint:
            raise ArtifactMismatchError(
                f"{path} was made for model {self.model_fingerprint}, this model is {fingerprint}; run: {repair}"
            )


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing and rename it to `path` once the block ends without error.

    Raises `ArtifactError` when the folder cannot be written or the disk is full; `path` is then as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder with --bundle"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what killed writers of `path` left; a file that was touched within the hour may have a living one."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def header_metadata(header: ArtifactHeader) -> dict[str, str]:
    """`header` as a safetensors file carries it, under `__metadata__`."""
    return {_HEADER_KEY: json.dumps(asdict(header), sort_keys=True)}


def write_tensors(path: Path, header: ArtifactHeader, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` and `header` to the safetensors file `path`, atomically."""
    payload = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(payload, metadata=header_metadata(header)))


def read_tensors(
    path: Path, kind: str, fingerprint: str | None, repair: str
) -> tuple[ArtifactHeader, dict[str, np.ndarray]]:
    """Read an artefact of `kind`, checking its header against `fingerprint`; `repair` is the command that remakes it.

    Raises `ArtifactError` when it is missing, corrupt or of a newer format, `ArtifactMismatchError` when it
    belongs to another model.
    """
    header = read_header(path, kind, fingerprint, repair)
    try:
        with safe_open(path, framework="numpy") as file:
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is corrupt ({error}); rebuild it with: {repair}") from error


def read_header(path: Path, kind: str, fingerprint: str | None, repair: str) -> ArtifactHeader:
    """Read and check only the header of an artefact written by `write_tensors`; raises as `read_tensors` does."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; make it with: {repair}")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            table = json.loads(file.read(length))
            fields = json.loads(table.pop("__metadata__")[_HEADER_KEY])
        end = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
        if end != path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size} bytes, its header says {end}")
        header = ArtifactHeader(**{name: fields[name] for name in ArtifactHeader.__dataclass_fields__})
        if not isinstance(header.format_version, int) or not isinstance(header.made_from, dict):
            raise ValueError("its header is damaged")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ArtifactError(f"{path} is not a {kind} of this program ({error}); rebuild it with: {repair}") from error
    header.check(path, kind, fingerprint, repair)
    return header
