"""Reading a model's safetensors: one file or many shards, memory-mapped, checked, and fingerprinted.

The fingerprint hashes the configuration, every tensor's name, type and shape, and 12 KiB of each tensor's bytes
(its start, middle and end), so that a fine-tuned copy has another one and a 100 GB model takes under a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hybrid.errors import ModelError
from hybrid.formats.config import Family, read_json

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ARRAY_TYPES = {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}  # as kernels see them
_SAMPLE = 4096


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, type name as safetensors has it, shape, and first and last byte in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of a model folder by name. Opening reads headers only; `tensor` maps one tensor's bytes."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` when no safetensors are there, a shard is missing, or a file is truncated."""
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        for path in _shards(folder):
            self.infos.update(read_table(path))
        self._open: dict[Path, Any] = {}
        self._read: set[str] = set()

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Where the tensor `name` lies. Raises `ModelError` when missing, not of `shape`, or of a type not known."""
        info = self.infos.get(name)
        self._read.add(name)
        if info is None:
            raise ModelError(f"{self.folder} has no tensor '{name}'; the checkpoint is incomplete for its config.json")
        if info.shape != shape:
            raise ModelError(
                f"{info.path}: tensor '{name}' has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        if info.dtype not in DTYPES:
            raise ModelError(f"{info.path}: tensor '{name}' is {info.dtype}; supported are bf16, f16 and f32")
        if info.end - info.start != math.prod(shape) * DTYPES[info.dtype].itemsize:
            raise ModelError(f"{info.path}: tensor '{name}' has {info.end - info.start} bytes; fetch the model again")
        return info

    def mapped(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor `name` as a read-only map of its own (bf16 as uint16, f16 as int16); dropped, its pages leave
        memory. Raises `ModelError` as `info` does."""
        info = self.info(name, shape)
        return np.memmap(info.path, _ARRAY_TYPES[info.dtype], "r", offset=info.start, shape=shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name`, in its stored type. Raises `ModelError` when missing or not of `shape`."""
        info = self.info(name, shape)
        try:
            if info.path not in self._open:
                self._open[info.path] = safe_open(info.path, framework="pt")
            return self._open[info.path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{info.path} is corrupt ({error}); fetch the model again") from error

    def refuse_unread(self, ignored: Callable[[str], bool]) -> None:
        """Raise `ModelError` for a tensor that was never asked for: the model would compute something else with it."""
        left = sorted(name for name in self.infos if name not in self._read and not ignored(name))
        if left:
            raise ModelError(
                f"{self.folder} has tensor '{left[0]}' that config.json gives no place to; the files do not match"
            )

    def fingerprint(self, config: Mapping[str, Any]) -> str:
        """16 hex digits that identify these weights under this configuration (see the module's docstring)."""
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(self.infos):
            info = self.infos[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            size = info.end - info.start
            with info.path.open("rb") as file:
                for offset in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                    file.seek(info.start + offset)
                    digest.update(file.read(min(_SAMPLE, size)))
        return digest.hexdigest()[:16]


class TensorNames:
    """Tensor names of a family; a checkpoint saved without its head may lack the leading `model.`."""

    def __init__(self, family: Family, checkpoint: Checkpoint) -> None:
        self._family = family
        self._prefixed = any(name.startswith("model.") for name in checkpoint.infos)

    def of(self, part: str, layer: int | None = None) -> str:
        """The checkpoint's name of `part`, such as `gate`, without `.weight` or `.bias`."""
        name = self._family.tensors[part].format(layer)
        return name if self._prefixed else name.removeprefix("model.")


def is_redundant(name: str) -> bool:
    """Whether a tensor that was never asked for is harmless: a tied head stored again, or stored RoPE frequencies."""
    return name.startswith("lm_head.") or name.endswith("rotary_emb.inv_freq")


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no 'weight_map' of file names; fetch the model again")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            if not path.is_file():
                raise ModelError(f"shard {path.name} is missing from {folder}; {index.name} lists it, fetch it again")
        return paths
    if list(folder.glob("*.bin")):
        raise ModelError(f"{folder} holds .bin weights only; save the model as safetensors and try again")
    raise ModelError(f"{folder} has neither model.safetensors nor model.safetensors.index.json; no weights to load")


def read_table(path: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file, checked against the file's size. Raises `ModelError`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header wants {length} bytes of a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        infos = {
            name: TensorInfo(path, entry["dtype"], tuple(entry["shape"]), *(base + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    if any(info.start < base or info.end < info.start for info in infos.values()):
        raise ModelError(f"{path} has tensors outside of its data; fetch it again")
    last = max((info.end for info in infos.values()), default=base)
    if last != size:
        raise ModelError(f"{path} is truncated or padded: {size} bytes, its header says {last}; fetch it again")
    return infos
