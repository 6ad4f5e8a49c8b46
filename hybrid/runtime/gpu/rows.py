"""`StepRows`: what a step is told of its rows, in pinned host memory, from where its graph takes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cpu_kernels.contract import MAX_BATCH
from hybrid.model.kv_cache import Row
from hybrid.model.transformer import Transformer
from hybrid.runtime.cpu_step import CpuStep
from placement.workspace import BATCHES


def size_of(rows: int) -> int:
    """The smallest step that takes so many rows. Raises `ValueError` where none does."""
    if not 1 <= rows <= BATCHES[-1]:
        raise ValueError(f"a step takes 1 to {BATCHES[-1]} rows, got {rows}")
    return next(size for size in BATCHES if size >= rows)


def places_of(places: torch.Tensor, size: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int32 [size] and tables int32 [size, blocks] within `places`, where both lie one after another, so that
    one copy brings them."""
    return places[:size], places[MAX_BATCH : places_size(size, blocks)].view(size, blocks)


def places_size(rows: int, blocks: int) -> int:
    """Elements of `places` for so many rows."""
    return MAX_BATCH + rows * blocks


class StepRows:
    """Of up to `most` rows: embedded f32 [most, d], and places int32, of which `places_of` says what they are.

    It shares positions and tables with the CPU's part of the step.
    """

    def __init__(self, model: Transformer, step: CpuStep, most: int, pinned: bool) -> None:
        self._model, self._step, self.most = model, step, most
        shared = step.arguments("dense").shared
        self._positions, self._tables = shared.positions, shared.tables
        self.blocks = self._tables.shape[1]
        self.embedded = torch.zeros(most, model.spec.d_model, pin_memory=pinned)
        self.places = torch.zeros(places_size(most, self.blocks), dtype=torch.int32, pin_memory=pinned)

    def fill(self, rows: Sequence[Row], size: int) -> None:
        """Take `rows`, repeating the last one up to `size`: it writes the same keys and values to the same place again,
        and names no other neuron. Raises `ValueError` for more than there is room for."""
        count = len(rows)
        if not count <= size <= self.most:
            raise ValueError(f"a step here takes 1 to {self.most} rows, got {count}")
        self._step.place(rows)
        for mine in (self._positions, self._tables):
            mine[count:size] = mine[count - 1]
        positions, tables = places_of(self.places, size, self.blocks)
        positions.numpy()[:], tables.numpy()[:] = self._positions[:size], self._tables[:size]
        if count == 1:
            self.embedded[:1] = self._model.embed(rows[0].token, int(self._positions[0]))
        else:
            tokens = np.array([row.token for row in rows])
            self.embedded[:count] = self._model.embed(tokens, self._positions[:count].astype(np.int64))
        self.embedded[count:size] = self.embedded[count - 1]
