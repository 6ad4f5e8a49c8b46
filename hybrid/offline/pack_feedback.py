"""int4 FFN weights rounded with error feedback, from the FFN inputs that the profile sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial

import numpy as np
import torch

from cpu_kernels.activations import activate_ref, activate_up_ref
from cpu_kernels.contract import LAYOUTS
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.packed import Part, split_name
from hybrid.offline.error_feedback import SPAN, feedback_factor, quantize_by_columns, quantize_by_rows
from hybrid.offline.pack_source import Source
from profiler.common.spec import ModelSpec
from profiler.profile import StoredInputs

_INPUTS = 8192  # sampled tokens in use: 128 MiB of f32 at d=4096


class FFNFeedback:
    """Gate, up and down of one layer after the other, in `parts` order; keeps one layer's inputs and their factors."""

    def __init__(
        self, inputs: StoredInputs, spec: ModelSpec, checkpoint: Checkpoint, sources: Mapping[str, Source]
    ) -> None:
        self._inputs, self._spec, self._checkpoint, self._sources = inputs, spec, checkpoint, sources
        self._layer = lru_cache(maxsize=1)(self._read_layer)

    def tasks(self, part: Part) -> Iterator[Callable[[], np.ndarray]]:
        """What makes the int4 rows of `part`, block after block; may run at once, before the next part's."""
        layer, name, _ = split_name(part.name)
        if layer is None:
            raise ValueError(f"'{part.name}' is not of a layer's FFN")
        _, factors = self._layer(layer)
        if name == "down":
            yield partial(self._down, layer)
            return
        for _, read in self._sources[part.name].blocks(self._checkpoint):
            yield partial(_by_columns, read, factors)

    def _down(self, layer: int) -> np.ndarray:
        """Rows of down, `SPAN` neurons at a time in the source's order, where a span has hot and cold ones.

        In a placement's order, where they part, the embedded model's perplexity rose by 3.1% rather than 2.1%.
        """
        source, f = self._sources[f"layers.{layer}.down"], self._spec.d_ff
        places = np.arange(f) if source.order is None else np.argsort(source.order)
        out = np.empty((f, LAYOUTS["int4"].row_bytes(self._spec.d_model)), np.uint8)
        for start in range(0, f, SPAN):
            rows = places[start : start + SPAN]
            factor = feedback_factor(self._fired(layer, rows))
            out[rows] = quantize_by_rows(source.rows(self._checkpoint, rows), factor)
        return out

    def _read_layer(self, layer: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """FFN inputs f32 [s, d_model] and the factors of their columns. Raises `ArtifactError`."""
        inputs = self._inputs.layer(layer, step=-(-self._inputs.count // _INPUTS)).astype(np.float32)
        columns = range(0, inputs.shape[1], SPAN)
        return inputs, [feedback_factor(inputs[:, start : start + SPAN]) for start in columns]

    def _fired(self, layer: int, rows: np.ndarray) -> np.ndarray:
        """What some neurons give for the sampled inputs: f32 [s, k]."""
        inputs, _ = self._layer(layer)
        up = torch.from_numpy(self._project(layer, "up", inputs, rows))
        if not self._spec.gated:
            return activate_ref(self._spec.activation, up).numpy()
        gate = torch.from_numpy(self._project(layer, "gate", inputs, rows))
        return (activate_ref(self._spec.activation, gate) * activate_up_ref(self._spec.activation, up)).numpy()

    def _project(self, layer: int, name: str, inputs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        out = inputs @ self._sources[f"layers.{layer}.{name}"].rows(self._checkpoint, rows).T
        if self._spec.ffn_bias:
            out += self._sources[f"layers.{layer}.{name}.bias"].rows(self._checkpoint, rows)
        return out


def _by_columns(read: Callable[[], np.ndarray], factors: list[np.ndarray]) -> np.ndarray:
    return quantize_by_columns(read(), factors)
