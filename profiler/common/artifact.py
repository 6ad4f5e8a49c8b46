"""Artefact files: safetensors or JSON with a header that says what they are, for which model, and from what made.

Nothing is reused because of its file name alone. A write goes to a temporary file in the same folder, is flushed
to disk and renamed, so a killed command leaves the old file or none. The header carries a digest of each tensor, held
against its bytes when it is read, and one of itself, held against it whenever a file is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from profiler.common.errors import ArtifactError, ArtifactMismatchError
from profiler.common.tensor_file import (
    PAD,
    Entry,
    Place,
    Table,
    header_bytes,
    layout,
    parse_json,
    read_into,
    read_table,
    table_json,
)

# 2 added the digests. Files of version 1, which have none, are read: what they hold is checked for sense all the same.
FORMAT_VERSION = 2
_HEADER_KEY, _DIGESTS_KEY, _CHECK_KEY = "hybrid", "digests", "check"
_DIGEST_DIGITS = 32
_PIECE_BYTES = 4 << 20  # that are read and hashed at a time
_NAMES = {"b1": "BOOL", "u1": "U8", "i1": "I8", "f2": "F16", "i4": "I32", "f4": "F32", "i8": "I64", "f8": "F64"}
ARRAY_TYPES = {name: np.dtype(code) for code, name in _NAMES.items()}


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
        """Raise unless this header is of `kind` and, when given, of the model `fingerprint`."""
        if self.kind != kind:
            raise ArtifactError(f"{path} is a {self.kind}, expected a {kind}; run: {repair}")
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
    if path.exists() and not path.is_file():  # a rename would put a file in the place of, say, /dev/null
        raise ArtifactError(f"cannot write {path}: it is not a file; name another")
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
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
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


def digest_of(pieces: Iterable[memoryview]) -> str:
    """The digest of a tensor's bytes, given in order."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:_DIGEST_DIGITS]


class TensorWriter:
    """Writes an artefact's tensors one after another, as `entries` name them, and its header once all are there."""

    def __init__(self, file: BinaryIO, header: ArtifactHeader, entries: Sequence[Entry], alignment: int = 1) -> None:
        """`file`: open for writing, at its beginning. Each tensor begins on a multiple of `alignment` bytes."""
        self._file, self._header, self._alignment = file, header, alignment
        self._places = layout(entries, alignment)
        self._digests = dict.fromkeys((entry.name for entry in entries), "0" * _DIGEST_DIGITS)
        self._left = iter(self._places.items())
        self._base = file.write(self._start())

    def add(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Write the next tensor, C-contiguous `pieces` in order. Raises `ValueError` for another's turn or size."""
        following, place = next(self._left)
        if following.startswith(PAD):
            self._file.write(bytes(place.end - place.start))
            following, place = next(self._left)
        begun = self._file.tell()
        self._digests[name] = digest_of(self._written(pieces))
        written = self._file.tell() - begun
        if following != name or written != place.end - place.start:
            raise ValueError(f"wrote {written} bytes of {name}, it was the turn of {following}: {place}")

    def _written(self, pieces: Iterable[np.ndarray]) -> Iterator[memoryview]:
        for piece in pieces:
            self._file.write(piece.data)
            yield piece.data

    def finish(self) -> None:
        """Put the digests into the header, whose place was kept."""
        self._file.seek(0)
        self._file.write(self._start())
        self._file.seek(0, os.SEEK_END)

    def _start(self) -> bytes:
        said = asdict(replace(self._header, format_version=FORMAT_VERSION))
        texts = {_HEADER_KEY: json.dumps(said, sort_keys=True), _DIGESTS_KEY: json.dumps(self._digests)}
        check = _check_of(texts, table_json(self._places, 0))
        return header_bytes(texts | {_CHECK_KEY: check}, self._places, self._alignment)


def _check_of(texts: Mapping[str, str], table: Mapping[str, Any]) -> str:
    """The digest of all that a header says but this."""
    said = json.dumps([dict(texts), dict(table)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:_DIGEST_DIGITS]


def write_tensors(path: Path, header: ArtifactHeader, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` and `header` to the file `path`, atomically. Raises `ArtifactError` when it cannot be written."""
    # The widest elements first, so that each array lies on a multiple of its element.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].itemsize, pair[0]))
    entries = [Entry(name, _NAMES[array.dtype.str[1:]], array.shape) for name, array in ordered]
    with atomic_write(path) as file:
        writer = TensorWriter(file, header, entries)
        for name, array in ordered:
            writer.add(name, [np.ascontiguousarray(array)])
        writer.finish()


@dataclass(frozen=True)
class ArtifactFile:
    """An open artefact: its `header`, and tensors, each of which is held against its digest when it is read.

    places: of the tensors, in the order of the file. digests: of each, or None in a file of format version 1, which has
    none. repair: the command that makes it anew.
    """

    path: Path
    file: BinaryIO
    header: ArtifactHeader
    places: dict[str, Place]
    digests: dict[str, str] | None
    repair: str

    def place(self, name: str) -> Place:
        """Where the tensor `name` lies. Raises `ArtifactError` when there is none."""
        if name not in self.places:
            raise ArtifactError(f"{self.path} has no tensor '{name}'; rebuild it with: {self.repair}")
        return self.places[name]

    def array(self, name: str) -> np.ndarray:
        """The tensor `name`. Raises `ArtifactError` when it is missing, damaged, or of a type that no artefact has."""
        place = self.place(name)
        if place.dtype not in ARRAY_TYPES:
            raise ArtifactError(f"{self.path}: tensor '{name}' is {place.dtype}; rebuild it with: {self.repair}")
        array = np.empty(place.shape, ARRAY_TYPES[place.dtype])
        self._read(name, array.reshape(-1).view(np.uint8).data)
        if place.dtype == "BOOL" and (array.view(np.uint8) > 1).any():
            raise ArtifactError(f"{self.path}: tensor '{name}' is not of booleans; rebuild it with: {self.repair}")
        return array

    def check(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read all tensors, a piece at a time; `advance` is called with bytes done. Raises as `array` does."""
        for name in self.places:
            self._read(name, None, advance)

    def _read(self, name: str, target: memoryview | None, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read a tensor's bytes, into `target` where there is one, and hold them against the digest."""
        try:
            found = digest_of(self._pieces(self.places[name], target, advance))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.path} is corrupt ({error}); rebuild it with: {self.repair}") from error
        if self.digests is not None and found != self.digests[name]:
            raise ArtifactError(
                f"{self.path} is damaged: tensor '{name}' is not what was written; rebuild it with: {self.repair}"
            )

    def _pieces(self, place: Place, target: memoryview | None, advance: Callable[[int], None]) -> Iterator[memoryview]:
        nbytes = place.end - place.start
        spare = memoryview(bytearray(min(_PIECE_BYTES, nbytes))) if target is None else target
        for start in range(0, nbytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, nbytes - start)
            piece = spare[:size] if target is None else target[start : start + size]
            read_into(self.file, place.start + start, piece)
            yield piece
            advance(size)


@contextlib.contextmanager
def open_artifact(path: Path, kind: str, fingerprint: str | None, repair: str) -> Iterator[ArtifactFile]:
    """Open an artefact of `kind`, and check its header, against `fingerprint` where one is given; reads no tensor.

    `repair`: the command that remakes it. Raises `ArtifactError` when it is missing, corrupt or of a newer format,
    `ArtifactMismatchError` when it belongs to another model.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; make it with: {repair}")
            file = stack.enter_context(path.open("rb"))
            table = read_table(file)
            header = _header_of(table)
            if header.format_version <= FORMAT_VERSION:
                digests = _digests_of(table, header)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a {kind} of this program ({error}); rebuild it with: {repair}"
            ) from error
        if header.format_version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {header.format_version}, this build reads up to {FORMAT_VERSION}; "
                f"upgrade hybrid, or rebuild the file with: {repair}"
            )
        header.check(path, kind, fingerprint, repair)
        yield ArtifactFile(path, file, header, _own(table), digests, repair)


def _header_of(table: Table) -> ArtifactHeader:
    """Raises `ValueError`, `KeyError` or `TypeError` for a table without one."""
    if _HEADER_KEY not in table.metadata:
        raise ValueError("its header does not say so")
    fields = parse_json(table.metadata[_HEADER_KEY])
    header = ArtifactHeader(**{name: fields[name] for name in ArtifactHeader.__dataclass_fields__})
    texts = header.kind, header.model_fingerprint, header.package_version
    whole = type(header.format_version) is int and header.format_version >= 1 and isinstance(header.made_from, dict)
    if not whole or not all(isinstance(text, str) for text in texts):
        raise ValueError("its header is damaged")
    return header


def _own(table: Table) -> dict[str, Place]:
    return {name: place for name, place in table.places.items() if not name.startswith(PAD)}


def _digests_of(table: Table, header: ArtifactHeader) -> dict[str, str] | None:
    """The tensors' digests, or None in a file of version 1. Raises `ValueError` or `KeyError` for a damaged header."""
    texts = dict(table.metadata)
    if header.format_version == 1 and not texts.keys() & {_CHECK_KEY, _DIGESTS_KEY}:
        return None
    base = next(iter(table.places.values())).start if table.places else 0
    if texts.pop(_CHECK_KEY) != _check_of(texts, table_json(table.places, base)):
        raise ValueError("its header is damaged")
    digests = parse_json(texts[_DIGESTS_KEY])
    if not isinstance(digests, dict) or digests.keys() != _own(table).keys():
        raise ValueError("its digests are not those of its tensors")
    return digests


def read_tensors(
    path: Path, kind: str, fingerprint: str | None, repair: str
) -> tuple[ArtifactHeader, dict[str, np.ndarray]]:
    """The header and all tensors of an artefact. Raises as `open_artifact` and `ArtifactFile.array` do."""
    with open_artifact(path, kind, fingerprint, repair) as file:
        return file.header, {name: file.array(name) for name in file.places}


def read_header(path: Path, kind: str, fingerprint: str | None, repair: str) -> ArtifactHeader:
    """Only the header of an artefact. Raises as `open_artifact` does."""
    with open_artifact(path, kind, fingerprint, repair) as file:
        return file.header
