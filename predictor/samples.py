"""What predictors learn from: one layer's FFN weights, its sampled inputs, and the labels recomputed from both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import linear

from cpu_kernels.activations import activate_ref, activate_up_ref
from profiler.common.errors import CorpusError

MIN_TOKENS = 256  # below this a layer's second moments say nothing about it
VALIDATION_SHARE = 0.125
BATCH = 512


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """One layer's FFN, neuron-major: gate [f, d] or None, up [f, d], down [f, d] (transposed), biases [f] or None.

    A neuron fires when the activation of its gate (its up, where there is no gate) is not 0, and with dReLU up's is not
    either; with activations such as SiLU nearly all do.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    activation: str
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None

    def float(self) -> FFNWeights:
        """The same weights in f32, sharing memory where they are already."""
        gate, gate_bias, up_bias = (
            None if tensor is None else tensor.float() for tensor in (self.gate, self.gate_bias, self.up_bias)
        )
        return FFNWeights(gate, self.up.float(), self.down.float(), self.activation, gate_bias, up_bias)

    @property
    def firing_weight(self) -> torch.Tensor:
        """The matrix [f, d] whose product decides what fires."""
        return self.up if self.gate is None else self.gate

    @cached_property
    def firing_bias(self) -> torch.Tensor:
        """f32 [f], zeros where the layer has none."""
        bias = self.up_bias if self.gate is None else self.gate_bias
        return torch.zeros(len(self.up)) if bias is None else bias.float()

    @cached_property
    def down_norm(self) -> torch.Tensor:
        """f32 [f], the length of each neuron's down row."""
        return self.down.float().norm(dim=1)

    def fired_and_mass(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For f32 weights and x [t, d]: which neurons fire, bool [t, f], and how much each adds, f32 [t, f].

        The output mass of a neuron is |h_i| * ||down_i||, the length of what it adds to the layer's output.
        """
        z = linear(x, self.firing_weight, self.firing_bias)
        mass = activate_ref(self.activation, z)
        fired = mass != 0
        if self.gate is not None:
            up = activate_up_ref(self.activation, linear(x, self.up, self.up_bias))
            if self.activation == "drelu":
                fired &= up != 0
            mass *= up.abs_()
        return fired, mass.abs_().mul_(self.down_norm)


def split_documents(documents: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation; no document, int [n], is in both.

    Raises `CorpusError` when there are too few tokens or only one document.
    """
    names, tokens = np.unique(documents, return_counts=True)
    if len(names) < 2 or len(documents) < MIN_TOKENS:
        raise CorpusError(
            f"the profile samples {len(documents)} tokens of {len(names)} documents, training wants at least "
            f"{MIN_TOKENS} of 2; run hybrid profile with more text"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    held = np.cumsum(tokens[order]) <= VALIDATION_SHARE * len(documents)
    if not held.any():
        held = order == np.argmin(tokens)  # a few long documents: the shortest
    validation = np.isin(documents, names[order[held]])
    return np.nonzero(~validation)[0], np.nonzero(validation)[0]


def batches(inputs: np.ndarray, rows: np.ndarray, size: int = BATCH) -> Iterator[torch.Tensor]:
    """`inputs[rows]` as f32 tensors of at most `size` tokens; only one is in memory at a time."""
    for start in range(0, len(rows), size):
        yield torch.from_numpy(inputs[rows[start : start + size]].astype(np.float32))
