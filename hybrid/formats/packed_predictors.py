"""The predictors of a packed model, as the kernels want them and memory-mapped: codes padded, neurons in packed order.

`packed_predictors.safetensors` lies beside the weights. It holds, per layer, fc1 int8 [r, padded(d)], fc2 int8
[f, padded(r)], their scales and biases f32, and all thresholds; each tensor starts on a multiple of 64 bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from cpu_kernels.blocks import padded
from cpu_kernels.low_rank import PredictorView, pad_codes
from hybrid.errors import ArtifactError, ArtifactMismatchError
from hybrid.formats.checkpoint import TensorInfo, read_table
from hybrid.formats.packed import ALIGNMENT, Part, file_header, order_hash
from predictor import bank
from profiler.common.artifact import ArtifactHeader, atomic_write, read_header
from profiler.common.spec import ModelSpec

PREDICTORS_FILE = "packed_predictors.safetensors"
KIND = "packed predictors"
_REPAIR = "hybrid pack SOURCE_MODEL"
_VECTORS = ("fc1_scale", "b1", "fc2_scale", "b2")


def pack_predictors(source: Path, spec: ModelSpec, order: np.ndarray, target: Path) -> None:
    """Write the bank `source` to the packed folder `target`, a layer at a time; done already, nothing is written.

    order: [n_layers, d_ff], the neurons of each layer. Raises `ArtifactError` for a damaged bank.
    """
    made = read_header(source, bank.KIND, spec.fingerprint, bank.REPAIR)
    header = ArtifactHeader(KIND, spec.fingerprint, {"predictors": made.key, "order": order_hash(order)})
    path = target / PREDICTORS_FILE
    try:
        if read_header(path, KIND, spec.fingerprint, _REPAIR).key == header.key:
            return
    except ArtifactError:
        pass  # none there, or another one: written now
    try:
        with safe_open(source, framework="numpy") as stored, atomic_write(path) as file:
            ranks = [stored.get_slice(f"layers.{layer}.b1").get_shape()[0] for layer in range(spec.n_layers)]
            file.write(file_header(header, list(_parts(spec, ranks))))
            for array in _arrays(stored, spec, order):
                file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(np.ascontiguousarray(array).data)
    except SafetensorError as error:
        raise ArtifactError(f"{source} is corrupt ({error}); rebuild it with: {bank.REPAIR}") from error


def open_predictors(folder: Path, spec: ModelSpec, order: np.ndarray) -> list[PredictorView]:
    """The predictors of the packed model in `folder`, one a layer, views on one map.

    Raises `ArtifactError` when there are none, or they are of another order than the weights'.
    """
    path = folder / PREDICTORS_FILE
    header = read_header(path, KIND, spec.fingerprint, _REPAIR)
    if header.made_from.get("order") != order_hash(order):
        raise ArtifactMismatchError(f"{path} has its neurons in another order than the weights; run: {_REPAIR}")
    table = read_table(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        thresholds = _view(mapped, table["thresholds"], np.float32)
        return [_predictor(mapped, table, layer, thresholds[layer], spec) for layer in range(spec.n_layers)]
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is not whole ({error}); pack the model again: {_REPAIR}") from error


def _parts(spec: ModelSpec, ranks: list[int]) -> Iterator[Part]:
    """Every tensor in the order of the file."""
    yield Part("thresholds", (spec.n_layers,), "f32")
    for layer, rank in enumerate(ranks):
        at = f"layers.{layer}"
        yield Part(f"{at}.fc1", (rank, padded(spec.d_model)), "i8")
        yield Part(f"{at}.fc2", (spec.d_ff, padded(rank)), "i8")
        for name, n in zip(_VECTORS, (rank, rank, spec.d_ff, spec.d_ff), strict=True):
            yield Part(f"{at}.{name}", (n,), "f32")


def _arrays(stored: safe_open, spec: ModelSpec, order: np.ndarray) -> Iterator[np.ndarray]:
    """What `_parts` names, from a bank."""
    yield stored.get_tensor("thresholds")
    for layer in range(spec.n_layers):
        at = f"layers.{layer}"
        yield pad_codes(stored.get_tensor(f"{at}.fc1"))
        yield pad_codes(stored.get_tensor(f"{at}.fc2")[order[layer]])
        for name in _VECTORS:
            vector = stored.get_tensor(f"{at}.{name}")
            yield vector if name in ("fc1_scale", "b1") else vector[order[layer]]


def _view(mapped: mmap.mmap, info: TensorInfo, dtype: type[np.generic]) -> np.ndarray:
    count = (info.end - info.start) // np.dtype(dtype).itemsize
    return np.frombuffer(mapped, dtype, count, info.start).reshape(info.shape)


def _predictor(
    mapped: mmap.mmap, table: dict[str, TensorInfo], layer: int, threshold: float, spec: ModelSpec
) -> PredictorView:
    def part(name: str, dtype: type[np.generic] = np.float32) -> np.ndarray:
        return _view(mapped, table[f"layers.{layer}.{name}"], dtype)

    return PredictorView(
        part("fc1", np.int8),
        part("fc1_scale"),
        part("b1"),
        part("fc2", np.int8),
        part("fc2_scale"),
        part("b2"),
        np.float32(threshold),
        spec.d_model,
    )
