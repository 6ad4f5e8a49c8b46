"""Damage to artefact files: cut off, a bit flipped anywhere, written as version 1 did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from profiler.common.artifact import ArtifactHeader
from profiler.common.tensor_file import PAD, read_table


def write_version_1(path: Path, header: ArtifactHeader, tensors: Mapping[str, np.ndarray]) -> None:
    """As the first versions wrote artefacts: by the safetensors package, without digests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = json.dumps(asdict(replace(header, format_version=1)), sort_keys=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, {"hybrid": said})


def header_end(data: bytes) -> int:
    """Where the tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def cut_off(data: bytes) -> Iterator[tuple[str, bytes]]:
    """`data` cut off at several points, and with a byte too many."""
    end = header_end(data)
    for size in (0, 1, 7, 8, 9, end // 2, end - 1, end, end + 1, (end + len(data)) // 2, len(data) - 1):
        yield f"{size} of {len(data)} bytes", data[:size]
    yield "a byte too many", data + b"\0"


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """`data` with one bit of byte `at` flipped."""
    damaged = bytearray(data)
    damaged[at] ^= 1 << bit
    return bytes(damaged)


def flipped_headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """`data` with one bit flipped in each name and each value that its header has, and in its length."""
    end = header_end(data)
    yield "length", flipped(data, 1)
    text = data[8:end].rstrip()
    inside = False
    for at, byte in enumerate(text):
        inside, begins = byte not in b'{}[]:,"\\ ', not inside
        if inside and begins:
            yield f"byte {at}, {text[at : at + 20]!r}", flipped(data, 8 + at, bit=at % 7)


def flipped_tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """The file's bytes with one bit flipped at the beginning, in the middle and at the end of each tensor."""
    data = path.read_bytes()
    with path.open("rb") as file:
        places = read_table(file).places
    for name, place in places.items():
        if not name.startswith(PAD):
            for at in {place.start, (place.start + place.end) // 2, place.end - 1}:
                if place.start <= at < place.end:
                    yield f"{name} at {at - place.start}", flipped(data, at, bit=at % 8)
