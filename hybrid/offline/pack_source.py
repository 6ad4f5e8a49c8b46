"""Where the rows of each packed tensor come from: tensors of the checkpoint, joined, transposed or reordered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpu_kernels.lanes import widen_ref
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.packed import Part
from hybrid.formats.tensors import TensorNames
from profiler.common.spec import ModelSpec

_BLOCK_WEIGHTS = 2**21


@dataclass(frozen=True, eq=False)
class Source:
    """Where the rows of a packed tensor come from: checkpoint tensors with their shapes, one after another.

    order: of the rows, taken from the one tensor there is; transposed: its columns are the rows.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    order: np.ndarray | None = None
    transposed: bool = False

    @classmethod
    def of(cls, part: Part, spec: ModelSpec, names: TensorNames, order: np.ndarray) -> Source:
        """The source of `part` with the neurons of each layer in `order` [n_layers, d_ff]."""
        layer, name, kind = split_name(part.name)
        if name == "qkv":
            kv = spec.n_kv_heads * spec.head_dim
            rows = {"q": spec.n_heads * spec.head_dim, "k": kv, "v": kv}
            return cls(tuple((f"{names.of(p, layer)}.{kind}", (n, *part.shape[1:])) for p, n in rows.items()))
        transposed = name == "down" and kind == "weight"
        reordered = layer is not None and (name in ("gate", "up") or transposed)
        shape = part.shape[::-1] if transposed else part.shape
        return cls(((f"{names.of(name, layer)}.{kind}", shape),), order[layer] if reordered else None, transposed)

    def blocks(self, checkpoint: Checkpoint) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        """The rows in order, 8 MiB of f32 at a time: how many, and what reads them as f32 [k, columns], on any thread;
        or one f32 vector after another."""
        for name, shape in self.tensors:
            stored = checkpoint.mapped(name, shape)
            rows = shape[-1] if self.transposed else shape[0]
            step = max(1, _BLOCK_WEIGHTS // (math.prod(shape) // rows))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield stop - start, partial(self._widened, stored, slice(start, stop))

    def rows(self, checkpoint: Checkpoint, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows, f32 [k, columns] or [k], of a part that comes from one tensor."""
        ((name, shape),) = self.tensors
        return self._widened(checkpoint.mapped(name, shape), rows)

    def _widened(self, stored: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        chosen = rows if self.order is None else self.order[rows]
        return np.ascontiguousarray(widen_ref(stored[:, chosen].T if self.transposed else stored[chosen]))


def split_name(name: str) -> tuple[int | None, str, str]:
    """`layers.3.gate.bias` as (3, gate, bias); `embedding` as (None, embedding, weight)."""
    words = name.split(".")
    layer = int(words[1]) if words[0] == "layers" else None
    own, *kind = words if layer is None else words[2:]
    return layer, own, kind[0] if kind else "weight"
