"""One model's weights, predictors and metadata under PowerInfer's names.

Rows of q and k are in llama.cpp's order, the down projection is neuron by neuron, and the number of neurons is made a
multiple of 256 by some that never fire. Predictors have no biases (`predictor.bias_free`) and read the residual, not
what the norm makes of it, so the norm's weights go into the columns of fc1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch

from hybrid.errors import InputError
from hybrid.formats.powerinfer import Kind, Tensor
from hybrid.formats.powerinfer_tokens import tokenizer_metadata
from hybrid.model.loader import ModelFolder
from hybrid.model.reader import CheckpointReader
from predictor.bank import PredictorBank
from predictor.low_rank import LowRankPredictor
from profiler.common.spec import ModelSpec, RopeSpec

FileType = Literal["f16", "q4_0"]
FILE_TYPES: dict[FileType, int] = {"f16": 1, "q4_0": 2}  # as llama.cpp numbers them
_ARCHITECTURES = {"relu": "llama", "drelu": "bamboo"}
# Fields of a spec that may be as they are; any other has to be as Llama's. A window bounds the context.
_SHAPE = {"n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_context", "tied"}
_STORED = {"family", "fingerprint", "dtype", "embedding_dtype", "wide_kv"}
_FREE = _SHAPE | _STORED | {"activation", "norm_eps", "rope", "sliding_window", "sliding_layers"}
_NEURONS = 256  # PowerInfer divides a layer's neurons by so many
_WIDTH = 64  # its CUDA product of an f16 row reads so many elements at a time, with no end


def architecture_of(spec: ModelSpec) -> str:
    """PowerInfer's name of what computes a model. Raises `InputError` where none of its architectures does."""
    changed = {f.name for f in fields(spec) if f.name not in _FREE and getattr(spec, f.name) != f.default}
    rope = spec.rope or RopeSpec(kind="none")
    plain = rope.kind in ("plain", "linear") and rope == RopeSpec(rope.theta, rope.kind, rope.factor)
    changed |= {name for name, fits in (("rope", plain), ("activation", spec.activation in _ARCHITECTURES)) if not fits}
    changed |= {"head_dim"} if spec.n_heads * spec.head_dim != spec.d_model else set()
    if changed:
        raise InputError(
            f"PowerInfer runs Llamas with gates of {' or '.join(_ARCHITECTURES)} and plain RoPE; this {spec.family} "
            f"model with {spec.activation} differs in {', '.join(sorted(changed))}, and stays with hybrid"
        )
    if spec.d_model % _WIDTH:
        raise InputError(f"PowerInfer's kernels want a width that {_WIDTH} divides, this model's is {spec.d_model}")
    return _ARCHITECTURES[spec.activation]


def name_of(folder: ModelFolder) -> str:
    """What a model's files are called: as its folder, or its file without what follows the last dot."""
    return folder.path.stem if folder.path.is_file() else folder.path.name


def padded(values: np.ndarray, axis: int, multiple: int = _NEURONS) -> np.ndarray:
    """`values` with zeros behind them along `axis`, up to a multiple; by default the one for neurons."""
    widths = [(0, -size % multiple if at == axis else 0) for at, size in enumerate(values.shape)]
    return np.pad(values, widths)


def padded_size(size: int, multiple: int = _NEURONS) -> int:
    """What `padded` makes of `size`."""
    return size + -size % multiple


def fold(predictor: LowRankPredictor, norm: torch.Tensor, inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """fc1 [r, d] and fc2 [f, r], f32, of a predictor without biases, for the residual in place of what the norm, with
    weights [d], makes of it. Both are padded with zeros: r to what CUDA kernels want, f with neurons never predicted.

    inputs: some of those after the norm, [t, d]. Hidden units are f16 in PowerInfer, and larger for a residual by as
    much as that is larger than its norm: a power of two, which costs nothing, makes them at most 1 for `inputs`.
    """
    fc1 = predictor.fc1.float() * predictor.fc1_scale[:, None]
    largest = float((inputs @ fc1.T).abs().max()) or 1.0
    fc1 *= 2.0 ** -np.ceil(np.log2(largest)) * norm
    fc2 = padded((predictor.fc2.float() * predictor.fc2_scale[:, None]).numpy(), 0)
    fc2[len(predictor.fc2) :, predictor.rank - 1] = -1  # the last unit is the one that is nearly constant
    return padded(fc1.numpy(), 0, _WIDTH), padded(fc2, 1, _WIDTH)


@dataclass(frozen=True, eq=False)
class PowerInferModel:
    """A model that `architecture_of` took, with predictors without biases. inputs: f16 [n_layers, s, d], of its FFNs.

    Its tensors are read when their turn to be written comes.
    """

    folder: ModelFolder
    bank: PredictorBank
    inputs: np.ndarray
    kind: FileType

    def metadata(self) -> dict[str, Any]:
        """What the file says of the model and its tokenizer."""
        spec, rope = self.folder.spec, self.folder.spec.rope
        assert rope is not None
        name = architecture_of(spec)
        of_model: dict[str, Any] = {
            "context_length": min(spec.max_context, spec.sliding_window or spec.max_context),
            "embedding_length": spec.d_model,
            "block_count": spec.n_layers,
            "feed_forward_length": padded_size(spec.d_ff),
            "attention.head_count": spec.n_heads,
            "attention.head_count_kv": spec.n_kv_heads,
            "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
            "rope.dimension_count": spec.head_dim,
            "rope.freq_base": float(rope.theta),
        }
        if rope.kind == "linear":
            of_model |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
        return {
            "general.architecture": name,
            "general.name": name_of(self.folder),
            "general.file_type": FILE_TYPES[self.kind],
            "general.quantization_version": 2,
            **{f"{name}.{key}": value for key, value in of_model.items()},
            "powerinfer.sparse_threshold": 0.0,
            "hybrid.hidden_act": spec.activation,
            **tokenizer_metadata(self.folder.codec, spec.vocab_size),
        }

    def tensors(self) -> list[Tensor]:
        """In the order of the file. Embedding and head have 8 bits where others have 4; predictors f16, norms f32."""
        spec = self.folder.spec
        outer: Kind = "q8_0" if self.kind == "q4_0" else "f16"
        words, head = (spec.vocab_size, spec.d_model), "embedding" if spec.tied else "head"
        ends = [
            Tensor("token_embd.weight", words, outer, partial(self._stored, "embedding")),
            Tensor("output_norm.weight", (spec.d_model,), "f32", partial(self._stored, "final_norm")),
            Tensor("output.weight", words, outer, partial(self._stored, head)),
        ]
        return [*ends, *chain.from_iterable(self._layer(layer) for layer in range(spec.n_layers))]

    def _layer(self, layer: int) -> Iterator[Tensor]:
        spec, at = self.folder.spec, f"blk.{layer}"
        d, kv, f = spec.d_model, spec.n_kv_heads * spec.head_dim, padded_size(spec.d_ff)
        rank = padded_size(self.bank.predictors[layer].rank, _WIDTH)
        for name, part in (("attn_norm", "attention_norm"), ("ffn_norm", "ffn_norm")):
            yield Tensor(f"{at}.{name}.weight", (d,), "f32", partial(self._stored, part, layer))
        for number, (part, rows) in enumerate((("q", d), ("k", kv), ("v", kv))):
            yield Tensor(f"{at}.attn_{part}.weight", (rows, d), self.kind, partial(self._attention, layer, number))
        yield Tensor(f"{at}.attn_output.weight", (d, d), self.kind, partial(self._stored, "out", layer))
        for name, part in (("ffn_gate", "gate"), ("ffn_up", "up"), ("ffn_down_t", "down")):
            yield Tensor(f"{at}.{name}.weight", (f, d), self.kind, partial(self._neurons, layer, part))
        for number, shape in enumerate(((rank, d), (f, rank))):
            yield Tensor(f"{at}.fc{number + 1}.weight", shape, "f16", partial(self._predictor, layer, number))

    @cached_property
    def _source(self) -> CheckpointReader:
        return CheckpointReader(self.folder.spec, self.folder.checkpoint)

    def _stored(self, part: str, layer: int | None = None) -> np.ndarray:
        return self._source.tensor(part, layer).float().numpy()

    def _attention(self, layer: int, number: int) -> np.ndarray:
        """q, k or v; of the first two, rows that RoPE turns together are neighbours in llama.cpp."""
        spec, (weight, _) = self.folder.spec, self._source.qkv(layer)
        heads = (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)
        found = weight.split([count * spec.head_dim for count in heads])[number].float()
        if number < 2:
            found = found.view(heads[number], 2, -1, spec.d_model).transpose(1, 2).reshape(found.shape)
        return found.numpy()

    def _neurons(self, layer: int, part: str) -> np.ndarray:
        weight: torch.Tensor = getattr(self._source.ffn(layer), part)
        return padded(weight.float().numpy(), 0)

    def _predictor(self, layer: int, number: int) -> np.ndarray:
        inputs = torch.from_numpy(self.inputs[layer].astype(np.float32))
        norm = self._source.tensor("ffn_norm", layer).float()
        return fold(self.bank.predictors[layer], norm, inputs)[number]
