"""The header of a GGUF file: metadata and the table of tensors, held against the file's size.

    4 bytes magic | u32 version | u64 tensors | u64 entries of metadata | metadata | tensor infos | pad | data

Strings are a u64 length and UTF-8; an entry is its key, the type of its value and the value; a tensor info is its name,
the number of its dimensions, those (innermost first), its type's id and its place from the data's beginning. Nothing
is believed before it was compared with the bytes there are. The gguf package's reader takes seconds for a vocabulary
of 128,000 tokens and counts to what a damaged length says; this one reads headers only, in a tenth of a second.
PowerInfer's files have a magic and numbers of types of their own.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import ModelError
from hybrid.formats.folder import GGUF_MAGIC, POWERINFER_MAGIC
from hybrid.formats.gguf_types import POWERINFER_TYPES, TYPES
from profiler.common.errors import shown

_VERSIONS = (2, 3)
_SCALARS = {
    number: np.dtype(name)
    for number, name in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
    }.items()
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MOST_NAME = 256  # bytes of a tensor's name; the format's own limit is 64
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a file: the name of its type, its shape outermost first, and its bytes [start, end) in the file."""

    path: Path
    type: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The parts of one model: the metadata of the first, and all tensors by their names; `powerinfer`: by its magic."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    powerinfer: bool = False

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the headers of the file, or of all parts where it is one of several.

        Raises `ModelError` for a part that is missing, and for a file that is truncated, damaged or of another format.
        """
        paths = _parts(path)
        headers = [_read(each) for each in paths]
        tensors: dict[str, GGUFTensor] = {}
        for each, (_, found, _) in zip(paths, headers, strict=True):
            if twice := tensors.keys() & found.keys():
                raise ModelError(f"{each} has tensor {shown(min(twice))} once more; fetch the model again")
            tensors |= found
        metadata, _, powerinfer = headers[0]
        for key, there in (("split.count", len(paths)), ("split.tensors.count", len(tensors))):
            wanted = metadata.get(key, there)
            if wanted not in (there, 0):
                raise ModelError(f"{path}: '{key}' is {shown(wanted)}, found {there}; fetch all parts of the model")
        return cls(paths[0], metadata, tensors, powerinfer)


def stem_of(path: Path) -> str:
    """The name of the model in the file `path`, without what tells its parts apart."""
    split = _SPLIT.fullmatch(path.name)
    return split["stem"] if split else path.name.removesuffix(".gguf")


def _parts(path: Path) -> list[Path]:
    """All files of the model of which `path` is one, in order. Raises `ModelError` for one that is not there."""
    split = _SPLIT.fullmatch(path.name)
    if not split:
        return [path]
    count = int(split["count"])
    names = [f"{split['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for name in names:
        if not (path.parent / name).is_file():
            raise ModelError(f"{path.parent / name} is missing; {path.name} is one of {count} parts, fetch it too")
    return [path.parent / name for name in names]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor], bool]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Header(path, mapped).read()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error


class _Header:
    """Reads one header from its beginning; `_at` is how far it came. All methods raise `ValueError`."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size, self._at = path, data, len(data), 0
        self._types = TYPES

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor], bool]:
        magic, version = self._take(4), self._number("<I")
        if magic not in (GGUF_MAGIC, POWERINFER_MAGIC):
            raise ValueError(f"it begins with {magic!r}, expected {GGUF_MAGIC!r}")
        if powerinfer := magic == POWERINFER_MAGIC:
            self._types = POWERINFER_TYPES
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}, versions {_VERSIONS[0]} and {_VERSIONS[1]} are read")
        tensors, entries = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._checked(entries, 13, "entries of metadata")):
            key = self._string()
            if key in metadata:
                raise ValueError(f"its metadata has {shown(key)} twice")
            metadata[key] = self._value(self._number("<I"))
        infos = [self._info() for _ in range(self._checked(tensors, 25, "tensors"))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {shown(alignment)}, expected a power of two")
        base = -(-self._at // alignment) * alignment
        return metadata, dict(self._places(infos, base, alignment)), powerinfer

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise ValueError(f"it ends within its header, at {self._size:,} bytes")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _checked(self, count: int, least: int, what: str) -> int:
        """`count`, where the file has room for so many of at least `least` bytes."""
        if count > (self._size - self._at) // least:
            raise ValueError(f"it says that it has {count:,} {what}, more than its {self._size:,} bytes hold")
        return count

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode()

    def _value(self, kind: int) -> Any:
        """A value; arrays of numbers are arrays of NumPy's, of texts lists."""
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            number = np.frombuffer(self._take(_SCALARS[kind].itemsize), _SCALARS[kind])[0]
            # The shortest that is this f32, as config.json has it: 1e-05, not 9.999999747378752e-06.
            return float(str(number)) if isinstance(number, np.float32) else number.item()
        if kind != _ARRAY:
            raise ValueError(f"its metadata has a value of type {kind}, which is not known")
        inner, count = self._number("<I"), self._number("<Q")
        if inner in _SCALARS:
            size = self._checked(count, _SCALARS[inner].itemsize, "numbers") * _SCALARS[inner].itemsize
            return np.frombuffer(self._take(size), _SCALARS[inner])
        if inner != _STRING:
            raise ValueError(f"its metadata has an array of type {inner}, which is not known")
        return self._strings(self._checked(count, 8, "texts"))

    def _strings(self, count: int) -> list[str]:
        """`_string`, many times, without its calls."""
        found, data, at, size, length = [], self._data, self._at, self._size, partial(struct.unpack_from, "<Q")
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0]
            if at > size:
                raise ValueError(f"it ends within its header, at {size:,} bytes")
            found.append(data[start:at])
        self._at = at
        return [text.decode(errors="replace") for text in found]

    def _info(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape and place of a tensor."""
        length = self._number("<Q")
        if length > _MOST_NAME:
            raise ValueError(f"a tensor's name has {length:,} bytes")
        name, dimensions = self._take(length).decode(), self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, self._number("<I"), shape[::-1], self._number("<Q")

    def _places(
        self, infos: list[tuple[str, int, tuple[int, ...], int]], base: int, alignment: int
    ) -> Iterator[tuple[str, GGUFTensor]]:
        """Tensors by their names; none lies beyond the file's end or over another."""
        names, end_before = set(), base
        for name, number, shape, offset in sorted(infos, key=lambda info: info[3]):
            kind = self._types.get(number)
            if kind is None:
                raise ValueError(f"tensor {shown(name)} is of type {number}, which is not known")
            if name in names:
                raise ValueError(f"it has tensor {shown(name)} twice")
            if not all(shape) or not shape or shape[-1] % kind.block:
                raise ValueError(
                    f"tensor {shown(name)} has shape {list(shape)}, rows of {kind.name} are blocks of {kind.block}"
                )
            start = base + offset
            end = start + math.prod(shape) // kind.block * kind.nbytes
            if offset % alignment or start < end_before:
                raise ValueError(f"tensor {shown(name)} lies over another, or not on {alignment} bytes")
            if end > self._size:
                raise ValueError(f"it is truncated: {self._size:,} bytes, tensor {shown(name)} ends at {end:,}")
            names.add(name)
            end_before = end
            yield name, GGUFTensor(self._path, kind.name, shape, start, end)
