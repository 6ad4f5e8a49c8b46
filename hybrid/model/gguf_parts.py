"""A GGUF model of Q8_0 or Q4_0 in its run-time form: the parts of a packed file, with the codes that the GGUF file has.

Only the bytes of a row lie otherwise, so that codes and scales are taken over as they are. `down` is neuron-major here
and lies along the other side there, but in PowerInfer's files: its blocks cannot be taken over, it is widened, turned
and rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cpu_kernels.blocks import FORMATS, quantize
from cpu_kernels.contract import BLOCK, Blocks
from hybrid.formats.folds import Stored
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.formats.packed import Part, split_name
from hybrid.formats.tensors import TensorNames
from hybrid.model.reader import CheckpointReader
from profiler.common.spec import ModelSpec

_ROWS, _COLUMNS = 2**21, 16 * BLOCK  # weights of rows, and columns of `down`, that are turned at a time


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The parts of `checkpoint`, whose `blocks` are those of `spec`, with neurons in `order` [n_layers, d_ff]."""

    spec: ModelSpec
    checkpoint: GGUFCheckpoint
    order: np.ndarray

    def tasks(self, part: Part) -> Iterator[Callable[[], np.ndarray]]:
        """What makes the bytes of `part`, block after block, on any thread. They raise `ModelError`, and `ValueError`
        for weights that blocks cannot hold."""
        layer, name, _ = split_name(part.name)
        if part.name == "order":
            yield lambda: self.order.astype(np.int32)
        elif len(part.shape) == 1:
            yield partial(self._vector, part)
        elif name == "down" and layer is not None and not self.checkpoint.neuron_major:
            yield partial(self._down, part, layer)
        else:
            yield from self._matrix(part)

    def takes(self, part: Part) -> bool:
        """Whether the codes of `part` are the file's own."""
        *_, name, kind = split_name(part.name)
        if part.name == "order" or kind != "weight" or len(part.shape) != 2:
            return False
        return name != "down" or self.checkpoint.neuron_major

    def _stored(self, part: Part) -> list[Stored]:
        """Where `part` lies in the checkpoint, or its pieces, one after another."""
        names = TensorNames(self.spec, self.checkpoint)
        layer, name, kind = split_name(part.name)
        found = [names.stored(each, layer, kind) for each in (("q", "k", "v") if name == "qkv" else (name,))]
        return [stored for stored in found if stored is not None]

    def _ordered(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """The rows of neurons in their order, others as they are."""
        layer, name, kind = split_name(part.name)
        of_neurons = name in ("gate", "up") or (name == "down" and kind == "weight")
        return rows[self.order[layer]] if layer is not None and of_neurons else rows

    def _vector(self, part: Part) -> np.ndarray:
        layer, name, kind = split_name(part.name)
        reader = CheckpointReader(self.spec, self.checkpoint)
        pieces = [reader.tensor(each, layer, kind) for each in (("q", "k", "v") if name == "qkv" else (name,))]
        return self._ordered(part, torch.cat(pieces).float().numpy())

    def _matrix(self, part: Part) -> Iterator[Callable[[], np.ndarray]]:
        step = max(1, _ROWS // part.shape[1])
        for stored in self._stored(part):
            self.checkpoint.info(stored.name, stored.shape)
            count = stored.shape[1 if split_name(part.name)[1] == "down" else 0]
            rows = self._ordered(part, np.arange(count) if stored.rows is None else stored.rows)
            for start in range(0, len(rows), step):
                yield partial(self._rows, stored, rows[start : start + step], _blocks(part))

    def _rows(self, stored: Stored, rows: np.ndarray, kind: Blocks) -> np.ndarray:
        taken = self.checkpoint.block_rows(stored.name, rows, kind)
        if taken is not None:
            return taken
        return quantize(self.checkpoint.rows(stored.name, stored.shape, rows).float().numpy(), kind)

    def _down(self, part: Part, layer: int) -> np.ndarray:
        (stored,) = self._stored(part)
        self.checkpoint.info(stored.name, stored.shape)
        out = np.empty(part.stored_shape, FORMATS[part.dtype].array)
        for start in range(0, len(out), _COLUMNS):
            some = slice(start, min(start + _COLUMNS, len(out)))
            out[some] = quantize(self.checkpoint.columns(stored.name, some), _blocks(part))
        return out[self.order[layer]]


def _blocks(part: Part) -> Blocks:
    if part.dtype != "int8" and part.dtype != "int4":
        raise ValueError(f"'{part.name}' is {part.dtype}, not one of blocks")
    return part.dtype
