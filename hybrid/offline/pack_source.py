"""Where the rows of each packed tensor come from: tensors of the checkpoint, joined, transposed or reordered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpu_kernels.lanes import widen_ref
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.folds import Stored
from hybrid.formats.packed import Part, split_name
from hybrid.formats.tensors import TensorNames
from profiler.common.spec import ModelSpec

_BLOCK_WEIGHTS = 2**21


@dataclass(frozen=True, eq=False)
class Source:
    """Where the rows of a packed tensor come from: parts of the checkpoint, one after another; else it is `constant`.

    order: of the rows, taken from the one part there is; transposed: its columns are the rows.
    """

    parts: tuple[Stored, ...]
    order: np.ndarray | None = None
    transposed: bool = False
    constant: np.ndarray | None = None

    @classmethod
    def of(cls, part: Part, spec: ModelSpec, names: TensorNames, order: np.ndarray) -> Source:
        """The source of `part` with the neurons of each layer in `order` [n_layers, d_ff]."""
        layer, name, kind = split_name(part.name)
        found = [names.stored(each, layer, kind) for each in (("q", "k", "v") if name == "qkv" else (name,))]
        stored = tuple(each for each in found if each is not None)
        if not stored:
            value = spec.logit_scale if name == "final_norm" else 1.0
            return cls((), constant=np.full(part.shape, value, np.float32))
        transposed = name == "down" and kind == "weight"
        reordered = layer is not None and (name in ("gate", "up") or transposed)
        return cls(stored, order[layer] if reordered else None, transposed)

    def blocks(self, checkpoint: Checkpoint) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        """The rows in order, 8 MiB of f32 at a time: how many, and what reads them as f32 [k, columns], on any thread;
        or one f32 vector after another."""
        if self.constant is not None:
            yield len(self.constant), partial(np.copy, self.constant)
        for part in self.parts:
            mapped = checkpoint.mapped(part.name, part.shape)
            rows = part.shape[-1] if self.transposed else part.count
            columns = math.prod(part.shape) // (part.shape[-1] if self.transposed else part.shape[0])
            step = max(1, _BLOCK_WEIGHTS // columns)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield stop - start, partial(self._widened, part, mapped, slice(start, stop))

    def rows(self, checkpoint: Checkpoint, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows, f32 [k, columns] or [k], of a part that comes from one tensor."""
        (part,) = self.parts
        return self._widened(part, checkpoint.mapped(part.name, part.shape), rows)

    def _widened(self, part: Stored, mapped: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        chosen = rows if self.order is None else self.order[rows]
        if part.rows is not None:
            chosen = part.rows[chosen]
        found = np.ascontiguousarray(widen_ref(mapped[:, chosen].T if self.transposed else mapped[chosen]))
        return (
            found if part.times == 1.0 and part.plus == 0.0 else found * np.float32(part.times) + np.float32(part.plus)
        )
