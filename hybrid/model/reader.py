"""Weights by part: from a Hugging Face checkpoint, tensors by the family's names, or from a packed file's map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cpu_kernels.matrix import Matrix
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.families import FAMILIES
from hybrid.formats.packed import PackedModel
from hybrid.formats.tensors import TensorNames, layer_shapes, outer_shapes
from hybrid.model.ffn import FFNMatrices, FFNRuntime
from hybrid.model.transformer import Linear, Norm
from placement.placement import Placement
from profiler.common.spec import ModelSpec

AttentionParts = tuple[Linear, Linear, Norm | None, Norm | None]


class Reader(Protocol):
    """The parts of a model, in the form and order in which the runtime has them."""

    def ffn(self, layer: int) -> FFNMatrices: ...

    def attention(self, layer: int) -> AttentionParts: ...

    def norm(self, part: str, layer: int | None = None) -> Norm | None: ...

    def embedding(self) -> Matrix: ...

    def positions(self) -> Matrix | None: ...

    def head(self) -> Matrix: ...


@dataclass(frozen=True)
class FFNTensors:
    """One layer's FFN as a checkpoint has it: gate and up [f, d], down [f, d] (transposed), biases; neuron-major."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class CheckpointReader:
    """Tensors of one model by part name, with the shapes that its spec asks for."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self._spec, self._checkpoint = spec, checkpoint
        self._names = TensorNames(spec, checkpoint)
        self._shapes = outer_shapes(spec) | layer_shapes(spec)

    def tensor(self, part: str, layer: int | None = None, kind: str = "weight") -> torch.Tensor:
        stored = self._names.stored(part, layer, kind)
        if stored is None:  # a norm without weights
            return torch.full(self._shapes[f"{part}.{kind}"], self._spec.logit_scale if part == "final_norm" else 1.0)
        return stored.of(self._checkpoint.tensor(stored.name, stored.shape))

    def rows(self, part: str, layer: int, rows: np.ndarray) -> torch.Tensor:
        """Some rows of a matrix."""
        stored = self._names.stored(part, layer)
        if stored is None:
            raise ValueError(f"the model has no matrix '{part}'")
        chosen = rows if stored.rows is None else stored.rows[rows]
        return self._checkpoint.rows(stored.name, stored.shape, chosen)

    def largest(self, part: str, layer: int | None = None, kind: str = "weight") -> float:
        """The largest magnitude in the tensor where a part lies. Raises `ModelError` for infinite numbers or NaN."""
        stored = self._names.stored(part, layer, kind)
        return 1.0 if stored is None else self._checkpoint.largest(stored.name, stored.shape)

    def vector(self, part: str, layer: int | None = None, kind: str = "bias") -> torch.Tensor | None:
        """A bias, or the weights of a norm; None where the model has none."""
        return self.tensor(part, layer, kind) if f"{part}.{kind}" in self._shapes else None

    def finite(self, part: str, layer: int | None = None, kind: str = "bias") -> torch.Tensor | None:
        """`vector` as f32. Raises as `largest` does."""
        found = self.vector(part, layer, kind)
        if found is not None:
            self.largest(part, layer, kind)
        return None if found is None else found.float()

    def norm(self, part: str, layer: int | None = None) -> Norm | None:
        """The norm `part`; None where the model has none."""
        weight = self.vector(part, layer, "weight")
        return None if weight is None else Norm(weight, self.vector(part, layer), self._spec.norm_eps)

    def qkv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and bias of q, k and v, one after another."""
        weight = torch.cat([self.tensor(part, layer) for part in ("q", "k", "v")])
        if not self._spec.qkv_bias:
            return weight, None
        return weight, torch.cat([self.tensor(part, layer, "bias") for part in ("q", "k", "v")])

    def out(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.tensor("out", layer), self.vector("out", layer)

    def ffn(self, layer: int) -> FFNTensors:
        gated = self._spec.gated
        return FFNTensors(
            gate=self.tensor("gate", layer) if gated else None,
            up=self.tensor("up", layer),
            down=self.tensor("down", layer).T,
            gate_bias=self.vector("gate", layer),
            up_bias=self.vector("up", layer),
            down_bias=self.vector("down", layer),
        )


def _ordered(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The rows of a matrix in `order`, in memory of NumPy's, which asks for huge pages as torch does not.

    Rows of a list lie on pages far apart: with 4 KiB pages 15 cores read active neurons at 116 GB/s, with 2 MiB pages
    at 143.
    """
    copied = torch.from_numpy(np.empty(tuple(tensor.shape), f"i{tensor.element_size()}")).view(tensor.dtype)
    return torch.index_select(tensor, 0, order, out=copied)


class MatrixReader:
    """A checkpoint's parts as the runtime has them, its neurons in a placement's order.

    The matrices of all layers that one kernel takes have one type; where a checkpoint mixes types there, they are f32.
    """

    def __init__(
        self, spec: ModelSpec, checkpoint: Checkpoint, placement: Placement | None, runtime: FFNRuntime
    ) -> None:
        self._spec, self._source, self._placement = spec, CheckpointReader(spec, checkpoint), placement
        self._runtime = runtime
        names, family = TensorNames(spec, checkpoint), FAMILIES[spec.family].tensors

        def mixed(*parts: str) -> bool:
            stored = {names.of(part, layer) + ".weight" for part in parts for layer in range(spec.n_layers)}
            return len({checkpoint.infos[name].dtype for name in stored if name in checkpoint.infos}) > 1

        self._mixed_attention = mixed("q", "k", "v", "out")
        self._mixed_ffn = mixed(*({"gate", "up", "down"} & family.keys()))

    def ffn(self, layer: int) -> FFNMatrices:
        t = self._source.ffn(layer)
        order = None if self._placement is None else torch.from_numpy(self._placement.order[layer]).long()

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if order is None else tensor[order]

        def matrix(tensor: torch.Tensor) -> Matrix:
            stored = tensor.float() if self._mixed_ffn else tensor
            return Matrix.of(stored if order is None else _ordered(stored, order))

        return FFNMatrices(
            None if t.gate is None else matrix(t.gate),
            matrix(t.up),
            matrix(t.down),
            None if t.gate_bias is None else pick(t.gate_bias).float(),
            None if t.up_bias is None else pick(t.up_bias).float(),
            None if t.down_bias is None else t.down_bias.float(),
        )

    def attention(self, layer: int) -> AttentionParts:
        linears = []
        for weight, bias in (self._source.qkv(layer), self._source.out(layer)):
            matrix = Matrix.of(weight.float() if self._mixed_attention else weight)
            linears.append(Linear(matrix, bias, self._runtime))
        return (linears[0], linears[1], self._source.norm("q_norm", layer), self._source.norm("k_norm", layer))

    def norm(self, part: str, layer: int | None = None) -> Norm | None:
        return self._source.norm(part, layer)

    def embedding(self) -> Matrix:
        return Matrix.of(self._source.tensor("embedding"))

    def positions(self) -> Matrix | None:
        return None if self._spec.rope is not None else Matrix.of(self._source.tensor("positions"))

    def head(self) -> Matrix:
        return Matrix.of(self._source.tensor("head"))


class PackedReader:
    """A packed file's parts, all of them views on its map."""

    def __init__(self, packed: PackedModel, runtime: FFNRuntime) -> None:
        self._packed, self._spec, self._runtime = packed, packed.spec, runtime
        self._shapes = outer_shapes(packed.spec) | layer_shapes(packed.spec)

    def ffn(self, layer: int) -> FFNMatrices:
        spec, at = self._spec, f"layers.{layer}"
        gate, up, down = (
            self._packed.matrix(f"{at}.{name}", spec.d_ff, spec.d_model) if name != "gate" or spec.gated else None
            for name in ("gate", "up", "down")
        )
        assert up is not None and down is not None
        biased = spec.ffn_bias
        return FFNMatrices(
            *(gate, up, down),
            self._vector(f"{at}.gate.bias", spec.d_ff) if biased and spec.gated else None,
            self._vector(f"{at}.up.bias", spec.d_ff) if biased else None,
            self._vector(f"{at}.down.bias", spec.d_model) if biased else None,
        )

    def attention(self, layer: int) -> AttentionParts:
        spec, at = self._spec, f"layers.{layer}"
        q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        qkv = self._linear(f"{at}.qkv", (q + 2 * kv, spec.d_model), spec.qkv_bias)
        out = self._linear(f"{at}.out", (spec.d_model, q), spec.out_bias)
        return qkv, out, self.norm("q_norm", layer), self.norm("k_norm", layer)

    def norm(self, part: str, layer: int | None = None) -> Norm | None:
        name = part if layer is None else f"layers.{layer}.{part}"
        if f"{part}.weight" not in self._shapes:
            return None
        weight, bias = (
            self._vector(f"{name}{end}", *shape) if (shape := self._shapes.get(f"{part}.{kind}")) else None
            for kind, end in (("weight", "" if part in ("q_norm", "k_norm") else ".weight"), ("bias", ".bias"))
        )
        assert weight is not None
        return Norm(weight, bias, self._spec.norm_eps)

    def embedding(self) -> Matrix:
        return self._packed.matrix("embedding", self._spec.vocab_size, self._spec.d_model)

    def positions(self) -> Matrix | None:
        if self._spec.rope is not None:
            return None
        return self._packed.matrix("positions", self._spec.max_context + 2, self._spec.d_model)

    def head(self) -> Matrix:
        return self._packed.matrix("head", self._spec.vocab_size, self._spec.d_model)

    def _linear(self, name: str, shape: tuple[int, int], biased: bool) -> Linear:
        bias = self._vector(f"{name}.bias", shape[0]) if biased else None
        return Linear(self._packed.matrix(name, *shape), bias, self._runtime)

    def _vector(self, name: str, n: int) -> torch.Tensor:
        return torch.from_numpy(self._packed.vector(name, n).copy())
