"""`RowCopies`: rows of each layer's FFN once more, in blocks of 8 or 4 bits, by which neurons are named; their file.

What a copy is for is its reader's business. `certified` reads the copy of the rows that decide, those of gate, or of up
where there is no gate, with bounds on what the rounding can change (`cpu_kernels.error_bound`). Copies lie in the
checkpoint's order of neurons, as predictors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cpu_kernels.blocks import quantize
from cpu_kernels.contract import LAYOUTS, Blocks
from cpu_kernels.error_bound import bounded_copy
from cpu_kernels.matrix import Matrix
from profiler.common.artifact import (
    ArtifactFile,
    ArtifactHeader,
    TensorWriter,
    atomic_write,
    open_artifact,
)
from profiler.common.errors import ArtifactError, InputError
from profiler.common.spec import ModelSpec
from profiler.common.tensor_file import Entry

KIND = "row copies"
REPAIR = "hybrid certify"
CopiedPart = Literal["gate", "up"]
_PARTS: tuple[CopiedPart, ...] = get_args(CopiedPart)
_STORED: dict[Blocks, str] = {"int8": "I8", "int4": "U8"}  # as `Matrix` has their rows
_BOUNDS = ("slope", "rest")
_PIECE = 256  # rows that a thread copies at a time


@dataclass(frozen=True, eq=False)
class LayerCopies:
    """One layer's copies: [f, d] each, or None where a matrix has none. slope, rest: f32 [f] of the deciding rows'
    error (`cpu_kernels.error_bound`), or None in copies without bounds."""

    gate: Matrix | None
    up: Matrix | None
    slope: np.ndarray | None = None
    rest: np.ndarray | None = None

    @property
    def deciding(self) -> Matrix:
        """The copy of gate, or of up where there is no copy of gate."""
        found = self.gate or self.up
        assert found is not None
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, which is what naming one token's neurons reads."""
        matrices = (part.nbytes for part in (self.gate, self.up) if part is not None)
        return sum(matrices) + sum(part.nbytes for part in (self.slope, self.rest) if part is not None)

    def reordered(self, order: np.ndarray) -> LayerCopies:
        """The copies of the same layer with its neurons permuted: new neuron i is old neuron order[i]."""

        def rows(part: Matrix | None) -> Matrix | None:
            return None if part is None else Matrix(part.rows[order], part.columns)

        bounds = (None if part is None else part[order] for part in (self.slope, self.rest))
        return LayerCopies(rows(self.gate), rows(self.up), *bounds)


@dataclass(frozen=True)
class CopyForm:
    """Which rows are copied and in which blocks; bounded: of one part, in int8, and with bounds of the error."""

    parts: tuple[CopiedPart, ...]
    blocks: Blocks = "int8"
    bounded: bool = False

    @classmethod
    def certified(cls, spec: ModelSpec) -> CopyForm:
        """What the strategy `certified` reads."""
        return cls(("gate",) if spec.gated else ("up",), bounded=True)

    def layer(self, weights: dict[CopiedPart, np.ndarray], threads: int = 1) -> LayerCopies:
        """The copies of f32 [f, d] weights by part. Raises `InputError` for weights that blocks cannot hold."""
        made: dict[str, Matrix] = {}
        bounds: list[np.ndarray] = []
        try:
            with ThreadPoolExecutor(threads) as pool:
                for part in self.parts:
                    rows = weights[part]
                    pieces = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
                    copied, *bounds = map(np.concatenate, zip(*pool.map(self._copied, pieces), strict=True))
                    made[part] = Matrix(copied, rows.shape[1])
        except ValueError as error:
            raise InputError(f"rows of {' and '.join(self.parts)} cannot be copied: {error}") from error
        return LayerCopies(made.get("gate"), made.get("up"), *bounds)

    def _copied(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return bounded_copy(rows) if self.bounded else (quantize(rows, self.blocks),)

    def entries(self, spec: ModelSpec, layer: int) -> Iterator[Entry]:
        """One layer's tensors in the order of the file."""
        width = LAYOUTS[self.blocks].row_bytes(spec.d_model)
        for part in self.parts:
            yield Entry(f"layers.{layer}.{part}", _STORED[self.blocks], (spec.d_ff, width))
        for name in _BOUNDS if self.bounded else ():
            yield Entry(f"layers.{layer}.{name}", "F32", (spec.d_ff,))

    def layer_bytes(self, spec: ModelSpec) -> int:
        """Bytes of one layer's copies."""
        width = LAYOUTS[self.blocks].row_bytes(spec.d_model)
        return spec.d_ff * (len(self.parts) * width + 8 * self.bounded)


@dataclass(frozen=True, eq=False)
class RowCopies:
    """The copies of all layers, in one form. `header`: of the file that they were read from."""

    layers: tuple[LayerCopies, ...]
    form: CopyForm
    header: ArtifactHeader | None = None

    @property
    def bytes_per_layer(self) -> tuple[int, ...]:
        return tuple(layer.nbytes for layer in self.layers)

    @classmethod
    def load(cls, path: Path, spec: ModelSpec, form: CopyForm, repair: str = REPAIR) -> RowCopies:
        """Read copies of `form` and check that they are of `spec`. Raises as `open_copies` does."""
        with open_copies(path, spec, form, repair) as stored:
            return cls(tuple(stored.layer(layer) for layer in range(spec.n_layers)), form, stored.file.header)


@dataclass(frozen=True, eq=False)
class StoredCopies:
    """Open copies of `spec`, which are read a layer at a time."""

    file: ArtifactFile
    spec: ModelSpec
    form: CopyForm

    def layer(self, layer: int) -> LayerCopies:
        """One layer's. Raises `ArtifactError` for damage."""

        def array(name: str) -> np.ndarray:
            return self.file.array(f"layers.{layer}.{name}")

        gate, up = (Matrix(array(part), self.spec.d_model) if part in self.form.parts else None for part in _PARTS)
        bounds = [array(name) if self.form.bounded else None for name in _BOUNDS]
        for found in bounds:
            # A NaN would bound nothing, silently.
            if found is not None and not (np.isfinite(found) & (found >= 0)).all():
                problem = f"a bound of layer {layer} is no number"
                raise ArtifactError(f"{self.file.path} is corrupt: {problem}; rebuild it with: {self.file.repair}")
        return LayerCopies(gate, up, *bounds)


@contextmanager
def open_copies(path: Path, spec: ModelSpec, form: CopyForm, repair: str = REPAIR) -> Iterator[StoredCopies]:
    """Open copies of `form`. Raises `ArtifactError`, also where the file has another form, or `ArtifactMismatchError`
    where it is not of `spec`."""
    with open_artifact(path, KIND, spec.fingerprint, repair) as file:
        expected = {entry.name: entry for layer in range(spec.n_layers) for entry in form.entries(spec, layer)}
        found = {name: Entry(name, place.dtype, place.shape) for name, place in file.places.items()}
        if found != expected:
            raise ArtifactError(f"{path} has other copies than are needed; make it with: {repair}")
        yield StoredCopies(file, spec, form)


def write_copies(
    path: Path,
    spec: ModelSpec,
    form: CopyForm,
    made_from: dict[str, Any],
    layers: Iterable[LayerCopies],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write each of `layers` as it is made, atomically; `advance` is called with layers done. Raises `ArtifactError`
    when the file cannot be written."""
    header = ArtifactHeader(KIND, spec.fingerprint, made_from)
    entries = [entry for layer in range(spec.n_layers) for entry in form.entries(spec, layer)]
    with atomic_write(path) as file:
        writer = TensorWriter(file, header, entries)
        for number, layer in enumerate(layers):
            given: dict[str, np.ndarray | None] = {"slope": layer.slope, "rest": layer.rest}
            for part, matrix in (("gate", layer.gate), ("up", layer.up)):
                given[part] = None if matrix is None else matrix.rows
            for entry in form.entries(spec, number):
                array = given[entry.name.rpartition(".")[2]]
                assert array is not None
                writer.add(entry.name, [np.ascontiguousarray(array)])
            advance(1)
        writer.finish()
