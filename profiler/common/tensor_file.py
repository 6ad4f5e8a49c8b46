"""Files of tensors in the safetensors format: their table, held against the file to the last byte, and its text.

    8 bytes n, little-endian | n bytes of JSON, padded with blanks | the tensors' bytes, one after another

The JSON gives each tensor's type, shape and place by name, and texts under `__metadata__`. Reading goes by nothing that
the file says before it was compared with the rest of it: a table that is accepted has tensors that follow each other
without hole or overlap from the header to the file's last byte, each of exactly its shape's bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeGuard

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
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        raise ValueError(f"it has {size} bytes, its header wants {length}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object of tensors")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"its {_METADATA} are not texts")
    found = [(name, _place(name, entry, 8 + length)) for name, entry in header.items()]
    places = dict(sorted(found, key=lambda pair: (pair[1].start, pair[1].end)))
    at = 8 + length
    for name, place in places.items():
        if place.start != at:
            raise ValueError(f"tensor {name!r} begins at byte {place.start}, the one before it ends at {at}")
        at = place.end
    if at != size:
        raise ValueError(f"it has {size} bytes, its header says {at}")
    return Table(metadata, places)


def parse_json(data: bytes | str) -> Any:
    """What the JSON text `data`, UTF-8, says. Raises `ValueError`, also for one nested too deeply or with a name twice
    in an object."""
    try:
        return json.loads(data if isinstance(data, str) else data.decode(), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its JSON has a name twice in one object")
    return found


def _place(name: str, entry: Any, base: int) -> Place:
    name.encode()  # a lone surrogate, which no message could show, is a ValueError
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"tensor {name!r} is of type {dtype!r:.40}, which is not known")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has shape {shape!r:.60} at {offsets!r:.60}, expected lists of whole numbers")
    start, end = offsets
    wanted = math.prod(shape) * ELEMENT_BYTES[dtype]
    if end - start != wanted:
        raise ValueError(f"tensor {name!r} has {end - start} bytes, {dtype} {shape!r:.60} are {wanted}")
    return Place(dtype, tuple(shape), base + start, base + end)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


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
