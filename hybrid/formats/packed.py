"""A packed model folder: weights neuron-major, in a placement's order and in their run-time type, memory-mapped.

The folder is whole by itself: config and tokenizer as in the source, `packed.safetensors`, and copies of the source's
artefacts in `hybrid/`, which keep the source's fingerprint. `packed.safetensors` holds, for `parts(spec)`:

    matrices   bf16 BF16, f16 F16 [n, columns]; int8 I8, int4 U8 [n, bytes of a row] (`cpu_kernels.blocks`)
    vectors    F32 [n]: norms and biases
    order      I32 [n_layers, d_ff]: the source's neuron that each row of gate, up and down is

Each tensor starts on a page. Opening reads the header only, which must name these tensors in this order; a row that is
never used stays on disk, so that digests are held against the weights by `PackedModel.check` alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cpu_kernels.contract import LAYOUTS
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_types import ROW_TYPES
from hybrid.console import size
from hybrid.errors import ArtifactError, InputError, ModelError
from hybrid.formats.config import parse_config, read_json
from hybrid.formats.tensors import layer_shapes, outer_shapes
from profiler.common.artifact import ArtifactFile, ArtifactHeader, open_artifact
from profiler.common.spec import DType, ModelSpec
from profiler.common.tensor_file import Entry, Place

PACKED_FILE = "packed.safetensors"
KIND = "packed model"
ALIGNMENT = 4096  # a page, so that a row of 4 KiB (bf16, d=2048) is read from the disk as one page, not two
_LEAST_ALIGNMENT = 64  # what kernels ask for
PackedDType = Literal["bf16", "f16", "int8", "int4"]
PartType = DType | Literal["i32", "i8"]
PACKED_DTYPES: tuple[PackedDType, ...] = get_args(PackedDType)
STORED_AS: dict[PartType, str] = {
    "bf16": "BF16", "f16": "F16", "f32": "F32", "int8": "I8", "int4": "U8", "i32": "I32", "i8": "I8"
}  # fmt: skip
_ARRAY_TYPES = {"I32": np.dtype(np.int32)} | {STORED_AS[name]: kind.array for name, kind in ROW_TYPES.items()}
REPAIR = "hybrid pack SOURCE_MODEL"


@dataclass(frozen=True)
class Part:
    """One tensor of a packed file: a matrix of `shape` (rows, columns) weights, or a vector, which is f32."""

    name: str
    shape: tuple[int, ...]
    dtype: PartType

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As the file says it: rows in blocks are counted in bytes."""
        if self.dtype in LAYOUTS and len(self.shape) == 2:
            return self.shape[0], LAYOUTS[self.dtype].elements(self.shape[1])
        return self.shape

    @property
    def entry(self) -> Entry:
        """As the file's table has it."""
        return Entry(self.name, STORED_AS[self.dtype], self.stored_shape)

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes


def packed_spec(spec: ModelSpec, dtype: PackedDType) -> ModelSpec:
    """`spec` as it is once its weights are stored in `dtype`.

    int4 keeps embedding, positions and head in int8: on the embedded model, whose head is the embedding, int4 there
    costs 1.5% of perplexity and saves 1.5 MB of 13.
    """
    return replace(spec, dtype=dtype, embedding_dtype="int8" if dtype == "int4" else None)


def parts(spec: ModelSpec) -> Iterator[Part]:
    """Every tensor of a packed model in the order of the file, which is that of a token's way through the model."""
    d, outer = spec.d_model, spec.embedding_dtype or spec.dtype
    yield Part("order", (spec.n_layers, spec.d_ff), "i32")
    yield Part("embedding", (spec.vocab_size, d), outer)
    if spec.rope is None:
        yield Part("positions", (spec.max_context + 2, d), outer)
    of_layer = list(_layer_parts(spec))
    for layer in range(spec.n_layers):
        for part in of_layer:
            yield replace(part, name=f"layers.{layer}.{part.name}")
    yield from _vectors(spec, "final_norm")
    if not spec.tied:
        yield Part("head", (spec.vocab_size, d), outer)


def _layer_parts(spec: ModelSpec) -> Iterator[Part]:
    d, q, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    for name in ("attention_norm", "attention_post_norm"):
        yield from _vectors(spec, name)
    yield from _linear("qkv", (q + 2 * kv, d), spec.dtype, q + 2 * kv if spec.qkv_bias else 0)
    for name in ("q_norm", "k_norm"):
        yield from (replace(part, name=part.name.removesuffix(".weight")) for part in _vectors(spec, name))
    yield from _linear("out", (d, q), spec.dtype, d if spec.out_bias else 0)
    for name in ("ffn_norm", "ffn_post_norm"):
        yield from _vectors(spec, name)
    neurons = (spec.d_ff, d)
    if spec.gated:
        yield from _linear("gate", neurons, spec.dtype, spec.d_ff if spec.ffn_bias else 0)
    yield from _linear("up", neurons, spec.dtype, spec.d_ff if spec.ffn_bias else 0)
    yield from _linear("down", neurons, spec.dtype, d if spec.ffn_bias else 0)


def _linear(name: str, shape: tuple[int, int], dtype: DType, bias: int) -> Iterator[Part]:
    yield Part(name, shape, dtype)
    if bias:
        yield Part(f"{name}.bias", (bias,), "f32")


def _vectors(spec: ModelSpec, norm: str) -> Iterator[Part]:
    """Weight and bias of a norm, as far as the model has them."""
    shapes = outer_shapes(spec) | layer_shapes(spec)
    for kind in ("weight", "bias"):
        if f"{norm}.{kind}" in shapes:
            yield Part(f"{norm}.{kind}", shapes[f"{norm}.{kind}"], "f32")


def split_name(name: str) -> tuple[int | None, str, str]:
    """`layers.3.gate.bias` as (3, gate, bias); `embedding` as (None, embedding, weight)."""
    words = name.split(".")
    layer = int(words[1]) if words[0] == "layers" else None
    own, *kind = words if layer is None else words[2:]
    return layer, own, kind[0] if kind else "weight"


def order_hash(order: np.ndarray) -> str:
    """16 hex digits that identify an order of neurons, integers [n_layers, d_ff]."""
    return hashlib.sha256(np.ascontiguousarray(order, np.int32).tobytes()).hexdigest()[:16]


def config_hash(config: Mapping[str, Any]) -> str:
    """16 hex digits of what a config.json says."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A file of tensors that is mapped, and where each lies. Views keep the map alive.

    Who truncates the file meanwhile, rather than replace it as `hybrid pack` does, ends this process by a signal.
    """

    path: Path
    parts: dict[str, Part]
    places: dict[str, Place]
    bytes: mmap.mmap

    @classmethod
    def of(cls, file: ArtifactFile, expected: list[Part]) -> TensorMap:
        """Map `file`, which must hold the tensors `expected` in their order and no others. Raises `ModelError`."""
        for part in expected:
            _check(file.path, part, file.places.get(part.name))
        for wanted, found in zip_longest((part.name for part in expected), file.places):
            if found != wanted:
                raise ModelError(f"{file.path} has tensor '{found}' in the place of '{wanted}'; pack the model again")
        try:
            mapped = mmap.mmap(file.file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"cannot map {file.path}: {error.strerror or error}") from error
        return cls(file.path, {part.name: part for part in expected}, file.places, mapped)

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it lies in the file, a view on the map: bf16 as uint16, f16 as int16, blocks as bytes."""
        place = self.place(name)
        dtype = _ARRAY_TYPES[place.dtype]
        return np.frombuffer(self.bytes, dtype, math.prod(place.shape), place.start).reshape(place.shape)

    def place(self, name: str) -> Place:
        """Where the tensor `name` lies. Raises `ModelError` where there is none."""
        if name not in self.places:
            raise ModelError(f"{self.path} has no tensor '{name}'; pack the model again")
        return self.places[name]

    def part(self, name: str, shape: tuple[int, ...]) -> Part:
        """The tensor `name`, which must be of `shape`. Raises `ModelError`."""
        self.place(name)
        part = self.parts[name]
        if part.shape != shape:
            raise ModelError(f"{self.path}: tensor '{name}' is {list(part.shape)}, expected {list(shape)}")
        return part


@dataclass(frozen=True, eq=False)
class PackedModel:
    """An open packed folder: `spec` with its run-time dtype and the source's fingerprint, `header`, and the one map."""

    path: Path
    spec: ModelSpec
    header: ArtifactHeader
    _tensors: TensorMap

    @staticmethod
    def is_packed(folder: Path) -> bool:
        """Whether `folder` is one that `hybrid pack` wrote."""
        return (folder / PACKED_FILE).is_file()

    @classmethod
    def open(cls, folder: Path) -> PackedModel:
        """Map the weights of `folder` and read their header; takes milliseconds, whatever the size.

        Raises `ModelError` for a file that is truncated or does not fit config.json, `ArtifactError` for one that
        `hybrid pack` did not write.
        """
        config = read_json(folder / "config.json")
        with open_packed(folder) as file:
            made_from = file.header.made_from
            dtype = made_from.get("dtype")
            if dtype not in PACKED_DTYPES or not isinstance(made_from.get("order"), str):
                raise ArtifactError(f"{file.path} does not say how it was packed; pack the model again: {REPAIR}")
            if made_from.get("config") != config_hash(config):
                raise ModelError(f"{folder / 'config.json'} is not the one that was packed; pack the model again")
            fingerprint = file.header.model_fingerprint
            spec = packed_spec(parse_config(config, str(folder / "config.json"), fingerprint), dtype)
            # What the source's weights said, and config.json does not.
            tied, wide_kv = spec.tied and "head" not in file.places, made_from.get("wide_kv") is True
            spec = replace(spec, tied=tied, wide_kv=wide_kv)
            return cls(folder, spec, file.header, TensorMap.of(file, list(parts(spec))))

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """The matrix `name` of [rows, columns] weights, a view on the map. Raises `ModelError` for another shape."""
        self._tensors.part(name, (rows, columns))
        return Matrix(self.stored(name), columns)

    def vector(self, name: str, n: int) -> np.ndarray:
        """The norm or bias `name`, f32 [n], a view on the map. Raises `ModelError` for another shape."""
        self._tensors.part(name, (n,))
        return self.stored(name)

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it lies in the file, a view on the map: bf16 as uint16, f16 as int16, blocks as bytes."""
        return self._tensors.stored(name)

    @cached_property
    def order(self) -> np.ndarray:
        """int32 [n_layers, d_ff]: the source's neuron that each row of gate, up and down is.

        Raises `ArtifactError` where that is not the order that the header names.
        """
        found = self.stored("order")
        if order_hash(found) != self.header.made_from["order"]:
            raise ArtifactError(
                f"{self._tensors.path} is damaged: tensor 'order' is not what was written; pack the model again"
            )
        return found

    def check_order(self, order: np.ndarray) -> None:
        """Raise `ArtifactError` unless the rows lie in `order`, a placement's [n_layers, d_ff]."""
        if order_hash(order) != self.header.made_from["order"]:
            raise ArtifactError(
                f"{self.path / PACKED_FILE} was packed in another order than the placement's; "
                "pack the model again with `hybrid pack`, or put its placement back"
            )

    def advise(self, learned: bool) -> None:
        """Tell the kernel whether FFN rows are read here and there (`learned`), or all of them one after another.

        Here and there, it reads no page that was not asked for; else it reads ahead.
        """
        for name in self._tensors.places:
            if name.endswith((".gate", ".up", ".down")):
                self._advise(mmap.MADV_RANDOM if learned else mmap.MADV_NORMAL, name, name)

    def prefetch(self, layer: int) -> None:
        """Start to read all neurons of `layer`, as a dense pass needs them, whatever was advised; returns at once."""
        self._advise(
            mmap.MADV_WILLNEED, f"layers.{layer}.{'gate' if self.spec.gated else 'up'}", f"layers.{layer}.down"
        )

    def _advise(self, advice: int, first: str, last: str) -> None:
        """Give `advice` for the whole pages from tensor `first` to tensor `last`."""
        start = -(-self._tensors.place(first).start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = self._tensors.place(last).end
        if end > start:
            self._map.madvise(advice, start, end - start)

    def release(self) -> None:
        """Take the map's pages out of this process's memory; they come back from the file when they are used."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def lock(self) -> None:
        """Read all weights and keep them in memory. Raises `InputError` when the system refuses."""
        if _libc().mlock(self._address, ctypes.c_size_t(len(self._map))) != 0:
            raise InputError(
                f"cannot lock {size(len(self._map))} in memory ({os.strerror(ctypes.get_errno())}); "
                "raise the limit with `ulimit -l`, free memory, or leave --mlock out"
            )

    def resident_share(self) -> float:
        """Share of the file's pages that are in memory now, for this process or another. Raises `InputError`."""
        pages = np.zeros(-(-len(self._map) // mmap.PAGESIZE), np.uint8)
        asked = self._address, ctypes.c_size_t(len(self._map)), pages.ctypes.data_as(ctypes.c_void_p)
        if _libc().mincore(*asked) != 0:
            raise InputError(f"cannot ask which pages are in memory: {os.strerror(ctypes.get_errno())}")
        return float((pages & 1).mean())

    @property
    def _map(self) -> mmap.mmap:
        return self._tensors.bytes

    @property
    def _address(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(np.frombuffer(self._map, np.uint8).ctypes.data)


def open_packed(folder: Path) -> AbstractContextManager[ArtifactFile]:
    """The weights of a packed folder as a file, such as to `check` them. Raises `ArtifactError`."""
    return open_artifact(folder / PACKED_FILE, KIND, None, REPAIR)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(path: Path, part: Part, place: Place | None) -> None:
    """Raise `ModelError` unless the file has `part` as it must be."""
    if place is None:
        raise ModelError(f"{path} has no tensor '{part.name}'; pack the model again")
    if (place.dtype, place.shape) != part.entry[1:] or place.start % _LEAST_ALIGNMENT:
        found, wanted = f"{place.dtype} {list(place.shape)}", f"{part.entry.dtype} {list(part.entry.shape)}"
        raise ModelError(f"{path}: tensor '{part.name}' is {found}, expected {wanted}; pack the model again")
