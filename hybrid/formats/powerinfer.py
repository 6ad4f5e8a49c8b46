"""Writing PowerInfer's files: a GGUF of version 3 whose first four bytes are `PWRI`, with the type ids of its time.

    magic | u32 3 | u64 tensors | u64 metadata | metadata | tensor infos | pad to 32 | data, each tensor padded to 32

A tensor's sizes are written innermost first. Its ggml is older than the IQ types, so that I32 is 18 there, not 26.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cpu_kernels import blocks
from hybrid.formats.folder import POWERINFER_MAGIC
from hybrid.formats.gguf_types import BY_NAME, POWERINFER_TYPES, row_bytes

Kind = Literal["f32", "f16", "q4_0", "q8_0", "i32"]

_VERSION, _ALIGNMENT = 3, 32
_IDS = {kind.name.lower(): number for number, kind in POWERINFER_TYPES.items()}
_PLAIN: dict[Kind, type] = {"f32": np.float32, "f16": np.float16, "i32": np.int32}
# Metadata by their Python or NumPy types: the id, and how the value is packed.
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10
_F16_MOST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: name, shape (rows first), type, and what gives its values, called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """In the file, without padding."""
        return stored_bytes(self.kind, prod(self.shape))

    def encoded(self) -> bytes:
        """Raises `ValueError` for values of another shape, or that the type cannot hold."""
        values = self.values()
        if values.shape != self.shape:
            raise ValueError(f"tensor '{self.name}' has shape {list(values.shape)}, expected {list(self.shape)}")
        if self.kind in ("q4_0", "q8_0"):
            return _in_blocks(np.ascontiguousarray(values, np.float32), self.kind)
        if self.kind == "f16" and not np.abs(values).max(initial=0) <= _F16_MOST:
            raise ValueError(f"tensor '{self.name}' has values that f16 cannot hold")
        return np.ascontiguousarray(values, _PLAIN[self.kind]).tobytes()


def stored_bytes(kind: Kind, count: int) -> int:
    """Bytes of so many values, whole blocks of them where the type has blocks."""
    return row_bytes(BY_NAME[kind.upper()], count)


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a file, one tensor in memory at a time; `advance` is called after each.

    Metadata are bool, int (u32), float (f32), str, np.uint64, lists of str, and arrays of int32 or float32. Raises
    `ValueError` as `Tensor.encoded` does.
    """
    head = bytearray(POWERINFER_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    offset = 0
    for tensor in tensors:
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += _text(tensor.name) + sizes + struct.pack("<IQ", _IDS[tensor.kind], offset)
        offset += tensor.nbytes + _padding(tensor.nbytes)
    with path.open("wb") as file:
        file.write(head + bytes(_padding(len(head))))
        for tensor in tensors:
            file.write(tensor.encoded() + bytes(_padding(tensor.nbytes)))
            advance(1)


def _padding(nbytes: int) -> int:
    return -nbytes % _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type id and value."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, np.uint64):
        return struct.pack("<IQ", _U64, int(value))
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = {np.dtype(np.int32): _I32, np.dtype(np.float32): _F32}[value.dtype]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))


def _in_blocks(weight: np.ndarray, kind: Kind) -> bytes:
    """Rows of blocks of 32: an f16 scale, then the codes; of Q4_0 the first half of a block is in the low nibbles."""
    ours: Literal["int4", "int8"] = "int4" if kind == "q4_0" else "int8"
    scales = blocks.choose_scales(weight, ours)
    codes = blocks.codes_of(weight, scales, ours).reshape(-1, blocks.BLOCK)
    if kind == "q4_0":
        stored = (codes + blocks.INT4_OFFSET).astype(np.uint8)
        packed = stored[:, : blocks.BLOCK // 2] | stored[:, blocks.BLOCK // 2 :] << 4
    else:
        packed = codes.astype(np.int8).view(np.uint8)
    return np.concatenate([scales.reshape(-1, 1).view(np.uint8), packed], axis=1).tobytes()
