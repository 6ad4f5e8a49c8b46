"""Files of tensors in the safetensors format: their table, held against the file to the last byte, and its text.

    8 bytes n, little-endian | n bytes of JSON, padded with blanks | the tensors' bytes, one after another

The JSON gives each tensor's type, shape and place by name, and texts under `__metadata__`. Reading goes by nothing that
the file says before it was compared with the rest of it: a table that is accepted has tensors that follow each other
without hole or overlap from the header to the file's last byte, each of its shape's bytes where its type is known.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from profiler.common.errors import shown

# Bytes of an element, by the format's names.
ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
PAD = "_pad."  # begins the names of tensors that only fill gaps: the format knows no holes
_METADATA = "__metadata__"
_MOST_HEADER = 100_000_000  # bytes; the format's own limit


class Entry(NamedTuple):
    """A tensor that is to be written: its name, its type by the format's name, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Place:
    """A tensor in a file: type by the format's name, shape, and its bytes [start, end) from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Table:
    """What a file's header says: texts by name, and its tensors in the order in which they lie, pads included."""

    metadata: dict[str, str]
    places: dict[str, Place]


def read_table(file: BinaryIO) -> Table:
    """The table of an open file. Raises `ValueError` where it contradicts itself or the file, and `OSError`."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MOST_HEADER):
        raise ValueError(f"its header wants {length} bytes of a file of {size}")
    header = parse_json(file.read(length), parse_constant=_no_number, parse_float=_no_number)
    if not isinstance(header, dict):
        raise ValueError(f"its header is {shown(header)}, expected an object")
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    found = [(name, _place(name, entry, 8 + length)) for name, entry in header.items()]
    places = dict(sorted(found, key=lambda pair: (pair[1].start, pair[1].end)))
    at = 8 + length
    for name, place in places.items():
        if place.start != at:
            raise ValueError(f"tensor {shown(name)} overlaps another, or follows a gap")
        at = place.end
    if at != size:
        raise ValueError(f"it is truncated or padded: {size} bytes, its header says {at}")
    return Table(metadata, places)


def parse_json(data: bytes | str, **options: Any) -> Any:
    """What JSON, as UTF-8, says; `options`: of `json.loads`. Raises `ValueError`, also where it nests too deeply, or
    names something twice in one object or by what is no text."""
    try:
        return json.loads(data if isinstance(data, str) else data.decode(), object_pairs_hook=_unique, **options)
    except RecursionError:
        raise ValueError("its header nests too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for name in found:
        name.encode()  # no surrogate
    if len(found) != len(pairs):
        raise ValueError(f"its header names something twice, beside {shown(pairs[0][0])}")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"its header has {shown(text)}, expected whole numbers")


def _place(name: str, entry: Any, base: int) -> Place:
    """One entry of a header. Raises `ValueError`."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"its header has {shown(entry)}, expected dtype, shape and two data_offsets")
    start, end = offsets
    expected = math.prod(shape) * ELEMENT_BYTES.get(dtype, 0)
    if dtype in ELEMENT_BYTES and start <= end != start + expected:
        raise ValueError(
            f"tensor {shown(name)} has {end - start} bytes, expected {expected} for {dtype} {shown(shape)}"
        )
    return Place(dtype, tuple(shape), base + start, base + end)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    """Whether `values` is a list of whole numbers from 0 on."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def layout(entries: Iterable[Entry], alignment: int = 1) -> dict[str, Place]:
    """Where tensors lie that follow each other, each on a multiple of `alignment`, with pads between them; bytes are
    counted from the end of the header."""
    places: dict[str, Place] = {}
    at = 0
    for number, entry in enumerate(entries):
        if gap := -at % alignment:
            places[f"{PAD}{number}"] = Place("U8", (gap,), at, at + gap)
        at += gap
        places[entry.name] = Place(entry.dtype, entry.shape, at, at + entry.nbytes)
        at += entry.nbytes
    return places


def table_json(places: Mapping[str, Place], base: int) -> dict[str, dict[str, Any]]:
    """The JSON of `places`, whose bytes are counted from `base`."""
    return {
        name: {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [p.start - base, p.end - base]}
        for name, p in places.items()
    }


def header_bytes(metadata: Mapping[str, str], places: Mapping[str, Place], alignment: int = 1) -> bytes:
    """A file up to its data, as long as a multiple of `alignment`, at least 8; `places` as `layout` gives them."""
    text = json.dumps({_METADATA: dict(metadata), **table_json(places, 0)}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % max(8, alignment))
    return len(text).to_bytes(8, "little") + text


def read_into(file: BinaryIO, start: int, target: memoryview) -> None:
    """Fill `target` with the bytes from `start` on. Raises `ValueError` where the file ends before."""
    file.seek(start)
    if file.readinto(target) != len(target):  # type: ignore[attr-defined]
        raise ValueError("it ends within a tensor")
