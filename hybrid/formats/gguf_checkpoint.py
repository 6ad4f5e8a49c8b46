"""A GGUF file under Hugging Face's view: config.json's fields, and tensors by the names and in the order of rows that a
folder of the same model has. Opening reads the header only.

F32, F16 and BF16 are as they are. Where the matrices of all layers are Q8_0, or all Q4_0, they are run as our int8 or
int4 blocks (`blocks`), and a tensor asked for as a whole is f32; of other types and mixtures it is f16.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpu_kernels.contract import Blocks
from cpu_kernels.lanes import widen_ref
from cpu_kernels.worker_pool import available_cpus
from hybrid.console import size
from hybrid.errors import ModelError
from hybrid.formats import gguf_types
from hybrid.formats.checkpoint import DTYPES, Checkpoint, TensorInfo
from hybrid.formats.config import parse_config
from hybrid.formats.families import FAMILIES
from hybrid.formats.gguf_architectures import ROPE_FACTORS, Architecture, architecture_of, config_of
from hybrid.formats.gguf_file import GGUFFile, GGUFTensor
from hybrid.formats.gguf_types import BY_NAME, FLOATS, OURS
from profiler.common.errors import shown

_ARRAYS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.int16),
    "BF16": np.dtype(np.uint16),
}
_PASS = 2**21  # weights that are widened at once
_MATRICES = ("q", "k", "v", "qkv", "out", "gate", "up", "gate_up", "down")


@dataclass(frozen=True, eq=False)
class _Stored:
    """A tensor of the file, where in it each row of Hugging Face's is (None: in its place), and what is to be added.

    turned: its rows are Hugging Face's columns.
    """

    tensor: GGUFTensor
    order: np.ndarray | None = None
    added: float = 0.0
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it."""
        return self.tensor.shape[::-1] if self.turned else self.tensor.shape

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Where in the file the `rows` of Hugging Face's tensor are."""
        return rows if self.order is None else self.order[rows]


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF model by Hugging Face's names."""

    described_by = "metadata"

    def __init__(self, path: Path) -> None:
        """Raises `ModelError` for a file that is damaged, of an unknown architecture, or has a tensor of no use."""
        self.file = GGUFFile.open(path)
        self.folder = self.file.path
        self.config: dict[str, Any] = config_of(self.file)
        self.neuron_major = architecture_of(self.file).neuron_major
        self._stored = dict(self._named())
        self.blocks: Blocks | None = self._common_blocks()
        widened = "F32" if self.blocks else "F16"
        self.infos = {
            name: TensorInfo(t.path, t.type if t.type in FLOATS else widened, stored.shape, t.start, t.end)
            for name, stored, t in ((name, stored, stored.tensor) for name, stored in self._stored.items())
        }

    def _named(self) -> Iterator[tuple[str, _Stored]]:
        row, layers = architecture_of(self.file), self.config.get("num_hidden_layers", 0)
        rest = self.file.tensors.keys() - {ROPE_FACTORS}
        rest -= {name for layer in range(layers) for name in predictor_names(layer)} if self.file.powerinfer else set()
        for part, name in row.names().items():
            for layer in range(layers) if "{}" in name else [0]:
                for kind in ("weight", "bias"):
                    stored = f"{name.format(layer)}.{kind}"
                    if tensor := self.file.tensors.get(stored):
                        rest.discard(stored)
                        if len(tensor.shape) == 1 and tensor.type not in FLOATS:
                            raise ModelError(
                                f"{self.file.path}: '{stored}' is a vector of {tensor.type}, expected one of "
                                f"{', '.join(FLOATS)}; fetch the model again"
                            )
                        shift = -row.family.norm_plus if kind == "weight" and part.endswith("norm") else 0.0
                        found = _Stored(
                            tensor,
                            self._order(row, part, tensor),
                            shift,
                            turned=row.neuron_major and part == "down" and kind == "weight",
                        )
                        yield f"{row.family.tensors[part].format(layer)}.{kind}", found
        if rest:
            raise ModelError(
                f"{self.file.path} has tensor {shown(min(rest))}, which has no place in a {row.model_type} model "
                f"of {layers} layers"
            )

    def _order(self, row: Architecture, part: str, tensor: GGUFTensor) -> np.ndarray | None:
        """Where in the file the rows of q, k and v are, where llama.cpp's converter moved them."""
        count = tensor.shape[0]
        if row.paired and part in ("q", "k"):
            heads = self.config.get("num_attention_heads" if part == "q" else "num_key_value_heads") or count
            if count % (2 * heads):
                raise ModelError(f"{self.file.path}: {heads} heads do not divide {count} rows of {part}")
            return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
        if row.joined and part in ("q", "k", "v"):
            spec = parse_config(self.config, str(self.file.path))
            moved = np.concatenate([row.family.rows[each](spec)[1] for each in ("q", "k", "v")])
            if len(moved) != count:
                raise ModelError(
                    f"{self.file.path} has {count} rows of queries, keys and values, expected {len(moved)}"
                )
            return np.argsort(moved)
        return None

    def _common_blocks(self) -> Blocks | None:
        types = self._matrix_types()
        return OURS.get(types.pop()) if len(types) == 1 else None

    def _matrix_types(self) -> set[str]:
        names = {self.family_name(part) for part in _MATRICES} - {""}
        return {
            s.tensor.type for name, s in self._stored.items() if name.endswith(".weight") and _pattern(name) in names
        }

    def family_name(self, part: str) -> str:
        """The family's name of a layer's `part`, with `#` for the layer; empty where it has none."""
        return FAMILIES[self.config["model_type"]].tensors.get(part, "").replace("{}", "#")

    def notices(self, run_bytes: int) -> list[str]:
        """What a user should know of the types that the file has and those that run; `run_bytes`: of the model."""
        types = Counter[str]()
        for stored in self._stored.values():
            if stored.tensor.type not in FLOATS:
                types[stored.tensor.type] += math.prod(stored.tensor.shape)
        if not types:
            return []
        if self.blocks:
            # On the embedded model int8 costs 0.01% of perplexity there, int4 2%.
            finer = "; `hybrid pack --dtype int8` rounds them finer" if self.blocks == "int4" else ""
            turned = "down projections, which the file has along the other side,"
            return [] if self.neuron_major else [f"{turned} are rounded to {self.blocks} once more{finer}"]
        names = ", ".join(name for name, _ in types.most_common())
        return [f"{names} run as f16, which takes {size(run_bytes)} of memory; `hybrid pack --dtype int8` halves it"]

    @cached_property
    def _maps(self) -> dict[Path, np.memmap]:
        return {path: np.memmap(path, np.uint8, "c") for path in {s.tensor.path for s in self._stored.values()}}

    def _bytes(self, tensor: GGUFTensor) -> np.ndarray:
        """A tensor as it lies in the file: uint8 [rows, bytes of a row], a view on the map. Raises `ModelError`."""
        try:
            raw = self._maps[tensor.path][tensor.start : tensor.end]
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot map {tensor.path}: {error}") from error
        return raw.reshape(math.prod(tensor.shape[:-1]), -1)

    def mapped(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor `name`, a view on the map where the file has its numbers so. Raises as `info` does."""
        info, stored = self.info(name, shape), self._stored[name]
        if stored.turned:
            return self._whole(stored, name, info.dtype, shape[::-1]).T
        return self._whole(stored, name, info.dtype, shape)

    def _whole(self, stored: _Stored, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor, its sides as the file has them."""
        if stored.tensor.type in FLOATS and stored.order is None and not stored.added:
            return self._bytes(stored.tensor).view(_ARRAYS[dtype]).reshape(shape)
        out = np.empty((math.prod(shape[:-1]), shape[-1]), _ARRAYS[dtype])

        def fill(rows: slice) -> None:
            out[rows] = self._read(name, np.arange(rows.start, rows.stop))

        _in_passes(fill, *out.shape)
        return out.reshape(shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name`. Raises as `info` does."""
        found = self.mapped(name, shape)
        return torch.from_numpy(found.view(f"i{found.itemsize}")).view(DTYPES[self.infos[name].dtype])

    def rows(self, name: str, shape: tuple[int, ...], rows: np.ndarray) -> torch.Tensor:
        """Some rows of a matrix, of `down` where the file is neuron-major some neurons. Raises as `info` does."""
        info = self.info(name, shape)
        found = self._read(name, rows)
        return torch.from_numpy(found.view(f"i{found.itemsize}")).view(DTYPES[info.dtype])

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows in the type that `infos` says. Raises `ModelError` for weights that it does not hold."""
        stored, kind = self._stored[name], _ARRAYS[self.infos[name].dtype]
        if len(stored.tensor.shape) == 1:  # a vector is one row, its elements are moved as rows are
            whole = self._bytes(stored.tensor).view(kind).ravel()
            moved = whole[stored.rows(np.arange(whole.size))][None]
            return moved + np.float32(stored.added) if stored.added else moved
        if stored.tensor.type in FLOATS:
            return self._bytes(stored.tensor)[stored.rows(rows)].view(kind)
        wide = self._widened(stored, rows)
        if kind == np.float32:
            return wide
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise ModelError(
                f"{self.folder}: tensor '{name}' has weights that f16 does not hold; fetch the model again"
            )
        return narrow.view(kind)

    def _widened(self, stored: _Stored, rows: np.ndarray) -> np.ndarray:
        """Some rows of a type of blocks as f32."""
        return gguf_types.widener(stored.tensor.type)(self._bytes(stored.tensor)[stored.rows(rows)])

    def wide(self, name: str) -> torch.Tensor:
        """The tensor `name` as f32, not rounded to the type that runs."""
        stored, info = self._stored[name], self.infos[name]
        if stored.tensor.type in FLOATS:
            return self.tensor(name, info.shape).float()
        return torch.from_numpy(self._widened(stored, np.arange(info.shape[0])))

    def largest(self, name: str, shape: tuple[int, ...]) -> float:
        """What no magnitude in a tensor is beyond, by the scales of blocks. Raises as a checkpoint's does."""
        self.info(name, shape)
        tensor = self._stored[name].tensor
        kind = BY_NAME[tensor.type]
        if not kind.most:
            return super().largest(name, shape)
        found, raw = 0.0, self._bytes(tensor)
        step = max(1, _PASS // tensor.shape[-1])
        for start in range(0, len(raw), step):
            most = gguf_types.largest(raw[start : start + step], kind)
            if not math.isfinite(most):
                raise ModelError(f"{self.folder}: tensor '{name}' has a scale that is no number; fetch the model again")
            found = max(found, most)
        return found

    def block_rows(self, name: str, rows: np.ndarray, kind: Blocks) -> np.ndarray | None:
        """What `rows` gives as rows of ours of `kind`, of the file's own codes; None where the file has others.

        Raises `ModelError` for a scale that is no number.
        """
        stored = self._stored[name]
        if stored.tensor.type not in OURS:
            return None
        try:
            return gguf_types.as_blocks(self._bytes(stored.tensor)[stored.rows(rows)], stored.tensor.type, kind)
        except ValueError as error:
            raise ModelError(f"{self.folder}: tensor '{name}': {error}; fetch the model again") from error

    def columns(self, name: str, columns: slice) -> np.ndarray:
        """Some columns of a matrix of blocks as rows, f32 [columns, rows]; they begin and end with a block."""
        tensor = self._stored[name].tensor
        kind = BY_NAME[tensor.type]
        at = slice(columns.start // kind.block * kind.nbytes, columns.stop // kind.block * kind.nbytes)
        wide = gguf_types.widener(tensor.type)(np.ascontiguousarray(self._bytes(tensor)[:, at]))
        return np.ascontiguousarray(wide.T)

    def predictor(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """fc1 [r, d] and fc2 [f, r] of a PowerInfer file's layer, f32. Raises `ModelError` where they do not fit."""
        found = []
        for name in predictor_names(layer):
            tensor = self.file.tensors.get(name)
            if tensor is None or len(tensor.shape) != 2:
                raise ModelError(f"{self.folder} has no matrix '{name}'; its predictors are incomplete, fetch it again")
            raw = self._bytes(tensor)
            if tensor.type in FLOATS:
                wide = widen_ref(raw.view(_ARRAYS[tensor.type]))
            else:
                wide = gguf_types.widener(tensor.type)(raw)
            if not np.isfinite(wide).all():
                raise ModelError(f"{self.folder}: '{name}' has infinite numbers or NaN; fetch the model again")
            found.append(torch.from_numpy(np.array(wide, np.float32)))
        fc1, fc2 = found
        wanted = (len(fc1), self.config["hidden_size"], self.config["intermediate_size"], len(fc1))
        if (*fc1.shape, *fc2.shape) != wanted:
            raise ModelError(
                f"{self.folder}: predictor {layer} is {list(fc1.shape)} and {list(fc2.shape)}, expected "
                f"{list(wanted[:2])} and {list(wanted[2:])}; fetch the model again"
            )
        return fc1, fc2


def predictor_names(layer: int) -> tuple[str, str]:
    """A layer's predictor in PowerInfer's files."""
    return f"blk.{layer}.fc1.weight", f"blk.{layer}.fc2.weight"


def _pattern(name: str) -> str:
    """A tensor's name without its kind, with `#` for its layer."""
    return ".".join("#" if word.isdecimal() else word for word in name.split(".")[:-1])


def _in_passes(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call `work` for all rows, a few at a time, on all CPUs."""
    step = max(1, _PASS // max(1, columns))
    passes = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    with ThreadPoolExecutor(available_cpus()) as threads:
        list(threads.map(work, passes))
