"""Reading a model's safetensors: one file or many shards, memory-mapped, checked, and fingerprinted.

The fingerprint hashes the configuration, every tensor's name, type and shape, and 12 KiB of each tensor's bytes
(its start, middle and end), so that a fine-tuned copy has another one and a 100 GB model takes under a second.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cpu_kernels.lanes import widen_ref
from hybrid.errors import ModelError
from hybrid.formats.config import read_json
from profiler.common import tensor_file
from profiler.common.errors import shown

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ARRAY_TYPES = {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}  # as kernels see them
_SAMPLE = 4096
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, type name as safetensors has it, shape, and first and last byte in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of a model folder by name. Opening reads headers only; `tensor` maps one tensor's bytes.

    described_by: what says which tensors there must be.
    """

    described_by = "config.json"

    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` when no safetensors are there, a shard is missing, or a file is truncated or damaged."""
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        for path in _shards(folder):
            found = read_table(path)
            if twice := self.infos.keys() & found.keys():
                raise ModelError(f"{folder} has tensor {shown(min(twice))} in two files; fetch the model again")
            self.infos.update(found)
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _corrupt(path, error) from error

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Where the tensor `name` lies. Raises `ModelError` when missing, not of `shape`, or of a type not known."""
        info = self.infos.get(name)
        if info is None:
            raise ModelError(
                f"{self.folder} has no tensor '{name}'; the checkpoint is incomplete for its {self.described_by}"
            )
        if info.shape != shape:
            raise ModelError(
                f"{info.path}: tensor '{name}' has shape {shown(list(info.shape))}, "
                f"{self.described_by} asks for {list(shape)}"
            )
        if info.dtype not in DTYPES:
            raise ModelError(f"{info.path}: tensor '{name}' is {info.dtype}; supported are bf16, f16 and f32")
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
            return self._open[info.path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(info.path, error) from error

    def rows(self, name: str, shape: tuple[int, ...], rows: np.ndarray) -> torch.Tensor:
        """Some rows of the matrix `name`, in its stored type. Raises `ModelError` as `tensor` does."""
        return self.tensor(name, shape)[torch.from_numpy(rows)]

    def same(self, first: str, second: str, shape: tuple[int, ...]) -> bool:
        """Whether two tensors hold the same numbers, whatever their types. Raises `ModelError` as `info` does."""
        rows = zip(*(self.tensor(name, shape).split(_BLOCK_ROWS) for name in (first, second)), strict=True)
        return all(torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float()) for a, b in rows)

    def largest(self, name: str, shape: tuple[int, ...]) -> float:
        """The largest magnitude in a tensor. Raises `ModelError` for one that is not a number or infinite."""
        stored = self.mapped(name, shape)
        # As integers, as floats of either sign are in order there, NaN and infinity last; 40 times as fast.
        signed, unsigned = (stored.view(f"{kind}{stored.itemsize}").max() for kind in "iu")
        ends = np.array([max(signed, 0), unsigned]).astype(f"u{stored.itemsize}").view(stored.dtype)
        found = float(np.abs(widen_ref(ends)).max())
        if not math.isfinite(found):
            raise ModelError(
                f"{self.folder}: tensor '{name}' has {'infinite numbers' if found == math.inf else 'NaN'} among its "
                "weights; fetch the model again"
            )
        return found

    def check_finite(self) -> None:
        """Read all weights. Raises `ModelError` for a tensor with infinite numbers or NaN."""
        for name, info in self.infos.items():
            if info.dtype in DTYPES and info.end > info.start:
                self.largest(name, info.shape)

    def fingerprint(self, config: Mapping[str, Any]) -> str:
        """16 hex digits that identify these weights under this configuration (see the module's docstring)."""
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(self.infos):
            info = self.infos[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + sample(info.path, info.start, info.end))
        return digest.hexdigest()[:16]


def sample(path: Path, start: int, end: int) -> bytes:
    """Some of a file's bytes from `start` to `end`: from their beginning, middle and end."""
    size, found = end - start, b""
    with path.open("rb") as file:
        for offset in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
            file.seek(start + offset)
            found += file.read(min(_SAMPLE, size))
    return found


def _corrupt(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is corrupt ({' '.join(str(error).split())}); fetch the model again")


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no 'weight_map' of file names; fetch the model again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index} lists {shown(name)}, expected names of files beside it; fetch it again")
            if not (folder / name).is_file():
                raise ModelError(f"shard {name} is missing from {folder}; {index.name} lists it, fetch it again")
        return [folder / name for name in names]
    if list(folder.glob("*.bin")):
        raise ModelError(f"{folder} holds .bin weights only; save the model as safetensors and try again")
    raise ModelError(f"{folder} has neither model.safetensors nor model.safetensors.index.json; no weights to load")


def read_table(path: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file, checked against the file's size: tensors fill it without gap or overlap.

    Raises `ModelError` for anything else.
    """
    try:
        with path.open("rb") as file:
            places = tensor_file.read_table(file).places
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    return {name: TensorInfo(path, p.dtype, p.shape, p.start, p.end) for name, p in places.items()}
