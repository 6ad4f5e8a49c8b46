"""From a model folder to a built `Transformer`: spec, checkpoint, and weights laid out as the placement asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from hybrid.config import FAMILIES, Family, parse_config, read_json
from hybrid.errors import ModelError
from hybrid.ffn import FFNRuntime, FFNTensors, HybridFFN
from hybrid.model import Attention, Block, Linear, Norm, Transformer
from hybrid.weights import Checkpoint
from placement.placement import Placement
from predictor.bank import PredictorBank
from profiler.spec import DType, ModelSpec

_DTYPE_NAMES: dict[str, DType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face model folder: its spec and its checkpoint, opened but with no weights read."""

    path: Path
    spec: ModelSpec
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read config and tensor tables. Raises `ModelError` when anything is missing, truncated or unknown."""
        path = path.absolute()
        if not path.is_dir():
            problem = "is not a folder" if path.exists() else "does not exist"
            raise ModelError(f"model folder {path} {problem}; give a Hugging Face model folder (nothing is downloaded)")
        config = read_json(path / "config.json")
        spec = parse_config(config, str(path / "config.json"))
        checkpoint = Checkpoint(path)
        names = _Names(FAMILIES[spec.family], checkpoint)
        up = checkpoint.infos.get(names.of("up", 0) + ".weight")
        if up is None:
            raise ModelError(f"{path} has no tensor '{names.of('up', 0)}.weight'; config.json and weights do not match")
        if up.dtype not in _DTYPE_NAMES:
            raise ModelError(f"{path}: weights are {up.dtype}; supported are bf16, f16 and f32")
        spec = replace(spec, dtype=_DTYPE_NAMES[up.dtype], fingerprint=checkpoint.fingerprint(config))
        return cls(path, spec, checkpoint)

    def ffn_tensors(self, layer: int) -> FFNTensors:
        """One layer's neurons in the checkpoint's order; `down` is a transposed view."""
        return _Reader(self).ffn(layer)

    def build(self, runtime: FFNRuntime, placement: Placement | None, bank: PredictorBank | None) -> Transformer:
        """Load every weight. Without a placement all neurons are cold, in the checkpoint's order."""
        reader = _Reader(self)
        blocks = [self._block(reader, layer, runtime, placement, bank) for layer in range(self.spec.n_layers)]
        embedding, shape = reader.embedding(), (self.spec.vocab_size, self.spec.d_model)
        head = embedding if self.spec.tied else reader.tensor("head", shape)
        positions, norm = reader.positions(), reader.norm("final_norm")
        # A tied head may be stored again, and old checkpoints store the RoPE frequencies.
        self.checkpoint.refuse_unread(lambda name: name.startswith("lm_head.") or name.endswith("rotary_emb.inv_freq"))
        return Transformer(self.spec, embedding, positions, blocks, norm, Linear(head, None, runtime))

    def _block(
        self, reader: _Reader, layer: int, runtime: FFNRuntime, placement: Placement | None, bank: PredictorBank | None
    ) -> Block:
        tensors = reader.ffn(layer)
        predictor = bank.predictors[layer] if bank is not None else None
        hot = 0
        if placement is not None:
            order = torch.from_numpy(placement.order[layer]).long()
            tensors, hot = _reordered(tensors, order), int(placement.hot[layer])
            predictor = predictor.reordered(order) if predictor is not None else None
        else:
            tensors = replace(tensors, down=tensors.down.contiguous())
        ffn = HybridFFN(tensors, self.spec.activation, hot, predictor, runtime)
        return Block(
            reader.norm("attention_norm", layer), reader.attention(layer, runtime), reader.norm("ffn_norm", layer), ffn
        )


def _reordered(tensors: FFNTensors, order: torch.Tensor) -> FFNTensors:
    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[order]

    return FFNTensors(
        gate=pick(tensors.gate),
        up=tensors.up[order],
        down=tensors.down[order].contiguous(),
        gate_bias=pick(tensors.gate_bias),
        up_bias=pick(tensors.up_bias),
        down_bias=tensors.down_bias,
    )


class _Names:
    """Tensor names of a family; a checkpoint saved without its head may lack the leading `model.`."""

    def __init__(self, family: Family, checkpoint: Checkpoint) -> None:
        self._family = family
        self._prefixed = any(name.startswith("model.") for name in checkpoint.infos)

    def of(self, part: str, layer: int | None = None) -> str:
        name = self._family.tensors[part].format(layer)
        return name if self._prefixed else name.removeprefix("model.")


class _Reader:
    """Tensors of one model by part name, with the shapes that its spec asks for."""

    def __init__(self, folder: ModelFolder) -> None:
        self._spec, self._checkpoint = folder.spec, folder.checkpoint
        self._family = FAMILIES[folder.spec.family]
        self._names = _Names(self._family, folder.checkpoint)

    def tensor(self, part: str, shape: tuple[int, ...], layer: int | None = None, kind: str = "weight") -> torch.Tensor:
        return self._checkpoint.tensor(f"{self._names.of(part, layer)}.{kind}", shape)

    def norm(self, part: str, layer: int | None = None, width: int | None = None) -> Norm:
        shape = (width or self._spec.d_model,)
        bias = self.tensor(part, shape, layer, "bias") if self._spec.norm == "layer" else None
        return Norm(self.tensor(part, shape, layer), bias, self._spec.norm_eps)

    def embedding(self) -> torch.Tensor:
        return self.tensor("embedding", (self._spec.vocab_size, self._spec.d_model))

    def positions(self) -> torch.Tensor | None:
        if self._spec.rope is not None:
            return None
        return self.tensor("positions", (self._spec.max_context + 2, self._spec.d_model))

    def attention(self, layer: int, runtime: FFNRuntime) -> Attention:
        spec = self._spec
        qkv = torch.cat([self._projection(part, layer) for part in self._qkv])
        biases = (
            [self.tensor(part, (rows,), layer, "bias") for part, rows in self._qkv.items()] if spec.qkv_bias else []
        )
        width = spec.n_heads * spec.head_dim
        out_bias = self.tensor("out", (spec.d_model,), layer, "bias") if spec.out_bias else None
        q_norm = self.norm("q_norm", layer, spec.head_dim) if spec.qk_norm else None
        k_norm = self.norm("k_norm", layer, spec.head_dim) if spec.qk_norm else None
        return Attention(
            spec,
            layer,
            Linear(qkv, torch.cat(biases) if biases else None, runtime),
            Linear(self.tensor("out", (spec.d_model, width), layer), out_bias, runtime),
            q_norm,
            k_norm,
        )

    @cached_property
    def _qkv(self) -> dict[str, int]:
        spec = self._spec
        kv = spec.n_kv_heads * spec.head_dim
        return {"q": spec.n_heads * spec.head_dim, "k": kv, "v": kv}

    def _projection(self, part: str, layer: int) -> torch.Tensor:
        return self.tensor(part, (self._qkv[part], self._spec.d_model), layer)

    def ffn(self, layer: int) -> FFNTensors:
        spec, bias = self._spec, self._spec.ffn_bias
        rows, shape = (spec.d_ff,), (spec.d_ff, spec.d_model)
        return FFNTensors(
            gate=self.tensor("gate", shape, layer) if spec.gated else None,
            up=self.tensor("up", shape, layer),
            down=self.tensor("down", (spec.d_model, spec.d_ff), layer).T,
            gate_bias=self.tensor("gate", rows, layer, "bias") if bias and spec.gated else None,
            up_bias=self.tensor("up", rows, layer, "bias") if bias else None,
            down_bias=self.tensor("down", (spec.d_model,), layer, "bias") if bias else None,
        )
