"""A Llama for `relufy.py`: the dense model, and the same with ReLU gates and a difference that is learnt.

Parameters of all layers lie in one tensor per kind of matrix, [layers, rows, columns], so that differences are added
by one batched product per step and the optimizer meets a few large tensors. Products then run as in the finished
model, over whole matrices, which costs less than two thin products more beside each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.config import parse_config, read_json
from hybrid.formats.difference import Difference as LowRank
from hybrid.model.rope import rotation
from profiler.common.errors import InputError, ModelError
from profiler.common.spec import ModelSpec

MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
FINAL_NORM, EMBEDDING, HEAD = "model.norm", "model.embed_tokens.weight", "lm_head.weight"
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
# The smooth count of firing neurons is a sigmoid of so many mean magnitudes of the layer's gates.
_WIDTH = 0.3


def tensor_name(kind: str, layer: int) -> str:
    """The name in a checkpoint, less `.weight`, of what is `kind` here."""
    return f"model.layers.{layer}.{(MATRICES | NORMS)[kind]}"


class Layer(NamedTuple):
    """What a layer computes with: matrices [out, in], norms, and biases and norms of heads where it has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attention_norm: Tensor
    ffn_norm: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Weights(Protocol):
    """What a network computes with, in the type that it computes in."""

    def layers(self) -> Iterator[Layer]:
        """All layers, in order."""

    def last_norm(self) -> Tensor:
        """The norm behind them."""


@dataclass(frozen=True, eq=False)
class Base:
    """A model as it was read: `stacked` by the names of `Layer` [layers, ...], on the device that computes."""

    spec: ModelSpec
    fingerprint: str
    stacked: dict[str, Tensor]
    final_norm: Tensor
    embedding: Tensor
    head: Tensor

    def layers(self) -> Iterator[Layer]:
        """All layers, in order."""
        yield from _layers(self.stacked)

    def last_norm(self) -> Tensor:
        """The norm behind them."""
        return self.final_norm


def load_base(folder: Path, device: str, dtype: torch.dtype, sparse: bool = False) -> Base:
    """Read a model folder: one of gated SiLU or GELU or, with `sparse`, of gated ReLU.

    Raises `ModelError` for another, and for one that is not like Llama.
    """
    config = read_json(folder / "config.json")
    spec = parse_config(config, str(folder / "config.json"))
    _check(spec, folder, ("relu",) if sparse else tuple(_GATES)[1:])
    checkpoint = Checkpoint(folder)

    def read(name: str, *shape: int) -> Tensor:
        return checkpoint.tensor(name, shape).to(dtype)

    stacked = {
        kind: torch.stack([read(f"model.layers.{n}.{name}", *shape) for n in range(spec.n_layers)]).to(device)
        for kind, (name, shape) in _parts(spec).items()
    }
    embedding = read(EMBEDDING, spec.vocab_size, spec.d_model).to(device)
    tied = spec.tied or HEAD not in checkpoint.infos
    head = embedding if tied else read(HEAD, spec.vocab_size, spec.d_model).to(device)
    final_norm = read(f"{FINAL_NORM}.weight", spec.d_model).to(device)
    return Base(spec, checkpoint.fingerprint(config), stacked, final_norm, embedding, head)


def _check(spec: ModelSpec, folder: Path, gates: Sequence[str]) -> None:
    """Raise `ModelError` for arithmetic that `block` does not do."""
    if spec.activation not in gates or not spec.gated:
        gated = "gated" if spec.gated else "not gated"
        raise ModelError(f"{folder}: its FFN is {gated}, {spec.activation}; expected gates of {', '.join(gates)}")
    plain = ModelSpec.__dataclass_fields__
    for name in ("norm", "norms", "parallel", "embedding_norm", "embedding_scale", "logit_scale", "logit_cap",
                 "out_bias", "ffn_bias", "other_rope"):  # fmt: skip
        if getattr(spec, name) != plain[name].default:
            raise ModelError(f"{folder}: {name} is {getattr(spec, name)}, which this script does not know")
    if spec.rope is None or spec.rope.kind == "none" or spec.rope.turned or spec.rope.follows_length:
        raise ModelError(f"{folder}: its position embedding is not one that this script knows; it takes Llama's RoPE")
    if spec.qk_norm not in (None, "head"):
        raise ModelError(f"{folder}: qk_norm is {spec.qk_norm}, which this script does not know")


def _parts(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name within a layer and shape by the names of `Layer`, of those that the model has."""
    d, f = spec.d_model, spec.d_ff
    heads = {"q": spec.n_heads * spec.head_dim, "k": spec.n_kv_heads * spec.head_dim}
    heads["v"] = heads["k"]
    shapes = {kind: (rows, d) for kind, rows in heads.items()}
    shapes |= {"o": (d, heads["q"]), "gate": (f, d), "up": (f, d), "down": (d, f)}
    parts: dict[str, tuple[str, tuple[int, ...]]]
    parts = {kind: (f"{MATRICES[kind]}.weight", shape) for kind, shape in shapes.items()}
    parts |= {kind: (f"{name}.weight", (d,)) for kind, name in NORMS.items()}
    if spec.qkv_bias:
        parts |= {f"{kind}_bias": (f"{MATRICES[kind]}.bias", (rows,)) for kind, rows in heads.items()}
    if spec.qk_norm:
        parts |= {f"{kind}_norm": (f"self_attn.{kind}_norm.weight", (spec.head_dim,)) for kind in "qk"}
    return parts


class Difference(torch.nn.Module):
    """What is learnt: for each kind of matrix `in` [L, r, m] and `out` [L, n, r], or a whole [L, n, m]; and the norms.

    All f32. At first it is nothing: `out` is 0.
    """

    def __init__(self, base: Base, ranks: Mapping[str, int | None], seed: int) -> None:
        """ranks: by kind of matrix; None for all of it."""
        super().__init__()
        self._base = base
        device, draw = base.embedding.device, torch.Generator().manual_seed(seed)
        self.into, self.out, self.norms = (torch.nn.ParameterDict() for _ in range(3))
        for kind in MATRICES:
            layers, rows, columns = base.stacked[kind].shape
            rank = ranks[kind]
            if rank is not None:
                into = torch.randn(layers, rank, columns, generator=draw) * columns**-0.5
                self.into[kind] = torch.nn.Parameter(into.to(device))
            self.out[kind] = torch.nn.Parameter(torch.zeros(layers, rows, rank or columns, device=device))
        for kind in NORMS:
            self.norms[kind] = torch.nn.Parameter(base.stacked[kind].float().clone())
        self.final_norm = torch.nn.Parameter(base.final_norm.float().clone())

    @property
    def layer_count(self) -> int:
        return self._base.spec.n_layers

    @property
    def is_low_rank(self) -> bool:
        """Whether every matrix's difference is a product."""
        return len(self.into) == len(MATRICES)

    def factors(self, kind: str, layer: int) -> tuple[Tensor, Tensor]:
        """`in` [r, m] and `out` [n, r] of a low-rank difference, on the CPU."""
        return self.into[kind][layer].detach().cpu(), self.out[kind][layer].detach().cpu()

    @torch.no_grad()
    def whole(self, kind: str, layer: int) -> Tensor:
        """A matrix with its difference, in the type that is computed in."""
        return self.matrices(kind)[layer]

    def vectors(self) -> dict[str, Tensor]:
        """Norms by name, f32 on the CPU."""
        norms = {
            tensor_name(kind, n): self.norms[kind][n].detach().cpu() for kind in NORMS for n in range(self.layer_count)
        }
        return norms | {FINAL_NORM: self.final_norm.detach().cpu()}

    @torch.no_grad()
    def start_from(self, path: Path) -> None:
        """Begin with the low-rank difference of a file. Raises `InputError` for one of other shapes or higher rank."""
        arrays = LowRank.load(path).arrays
        try:
            for layer in range(self._base.spec.n_layers):
                for kind in MATRICES:
                    self._start_matrix(kind, layer, arrays, tensor_name(kind, layer))
                for kind in NORMS:
                    self.norms[kind][layer] = torch.from_numpy(arrays[f"{tensor_name(kind, layer)}.vector"])
            self.final_norm.copy_(torch.from_numpy(arrays[f"{FINAL_NORM}.vector"]))
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{path} does not fit this model or --rank: {error}") from error

    def _start_matrix(self, kind: str, layer: int, arrays: Mapping[str, np.ndarray], name: str) -> None:
        scale, into, out = (torch.from_numpy(arrays[f"{name}.{part}"]).float() for part in ("scale", "in", "out"))
        out = out.T * scale
        if kind not in self.into:
            self.out[kind][layer] = out @ into
            return
        # Both factors of a direction get the same length, as steps of one size suit both then.
        even = (out.norm(dim=0) / into.norm(dim=1).clamp_min(1e-12)).sqrt()
        self.into[kind][layer, : len(scale)] = into * even[:, None]
        self.out[kind][layer, :, : len(scale)] = out / even.clamp_min(1e-12)

    def matrices(self, kind: str) -> Tensor:
        """The matrices of a kind with their difference, in the model's type [L, n, m]."""
        base = self._base.stacked[kind]
        if kind not in self.into:
            return (base + self.out[kind]).to(base.dtype)
        return torch.baddbmm(base, self.out[kind].to(base.dtype), self.into[kind].to(base.dtype))

    def last_norm(self) -> Tensor:
        """The sparse model's norm behind its layers."""
        return self.final_norm.to(self._base.embedding.dtype)

    def layers(self) -> Iterator[Layer]:
        """Layers of the sparse model; gradients reach what is learnt."""
        dtype = self._base.embedding.dtype
        learnt = {kind: self.matrices(kind) for kind in MATRICES}
        learnt |= {kind: self.norms[kind].to(dtype) for kind in NORMS}
        yield from _layers(self._base.stacked | learnt)


def _layers(stacked: Mapping[str, Tensor]) -> Iterator[Layer]:
    for parts in zip(*(tensor.unbind() for tensor in stacked.values()), strict=True):
        yield Layer(**dict(zip(stacked, parts, strict=True)))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attention(h: Tensor, cos: Tensor, sin: Tensor, w: Layer, head_dim: int, eps: float) -> Tensor:
    def heads(matrix: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        x = F.linear(h, matrix, bias).unflatten(-1, (-1, head_dim))
        return (x if norm is None else F.rms_norm(x, (head_dim,), norm, eps)).transpose(1, 2)

    q, k = (_rotate(x, cos, sin) for x in (heads(w.q, w.q_bias, w.q_norm), heads(w.k, w.k_bias, w.k_norm)))
    y = F.scaled_dot_product_attention(q, k, heads(w.v, w.v_bias, None), is_causal=True, enable_gqa=True)
    return F.linear(y.transpose(1, 2).flatten(2), w.o)


def block(
    x: Tensor, cos: Tensor, sin: Tensor, w: Layer, blend: Tensor | None, act: str, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: x [B, T, d], then a smooth and the true share of gates above 0.

    blend: share of the dense model's `act` beside ReLU, f32; None for the dense model.
    """
    x = x + _attention(F.rms_norm(x, x.shape[-1:], w.attention_norm, eps), cos, sin, w, head_dim, eps)
    h = F.rms_norm(x, x.shape[-1:], w.ffn_norm, eps)
    z = F.linear(h, w.gate)
    if blend is None:
        soft = fired = x.new_zeros((), dtype=torch.float32)
        gate = _GATES[act](z)
    else:
        # The width follows the gates' own size, held fixed: neither shrinking them all nor one large one is cheaper.
        wide = z.float()
        soft = torch.sigmoid(wide / (_WIDTH * wide.abs().mean().detach() + 1e-6)).mean()
        fired = (wide > 0).float().mean()
        gate = (wide.relu() + blend * (_GATES[act](wide) - wide.relu())).to(z.dtype)
    return x + F.linear(gate * F.linear(h, w.up), w.down), soft, fired


class Network:
    """Runs the dense model or the sparse one over tokens; on a GPU one compiled layer serves all layers."""

    def __init__(self, base: Base, context: int, compiled: bool) -> None:
        """Raises `InputError` where windows of `context` tokens are longer than the model can see."""
        spec, table = base.spec, base.embedding
        sees = spec.sliding_window if any(spec.sliding_layers) else spec.max_context
        if sees is not None and context > sees:
            raise InputError(f"windows of {context} tokens, the model sees {sees}; lower --context")
        assert spec.rope is not None
        self._spec, self._embedding = spec, table
        turns = rotation(spec.rope, spec.head_dim, torch.arange(context), context)
        self._cos, self._sin = (torch.cat((t, t), -1).to(table.device, table.dtype) for t in turns)
        self._block = torch.compile(block) if compiled else block

    def __call__(self, ids: Tensor, weights: Weights, blend: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states behind the last norm [B, T, d] for ids [B, T], and each layer's smooth and true firing share
        f32 [L]. blend: as `block` has it."""
        spec = self._spec
        x, soft, fired = F.embedding(ids, self._embedding), [], []
        x.requires_grad_(torch.is_grad_enabled())  # or the first layer would be compiled apart from the others
        cos, sin = self._cos[: ids.shape[1]], self._sin[: ids.shape[1]]
        for layer in weights.layers():
            x, *shares = self._block(x, cos, sin, layer, blend, spec.activation, spec.head_dim, spec.norm_eps)
            soft.append(shares[0])
            fired.append(shares[1])
        x = F.rms_norm(x, x.shape[-1:], weights.last_norm(), spec.norm_eps)
        return x, torch.stack(soft), torch.stack(fired)
