"""The transformer: one class for every family, driven by its `ModelSpec`; f32 activations over stored weights.

This is the way of many tokens at once: prefill, profiling, evaluation. An answer's tokens go one by one through
`hybrid.runtime.cpu_step`, which computes the same in one compiled call.

Weights keep their stored type and are widened to f32 where they are used, so a bf16 checkpoint computes the same
numbers as f32 arithmetic on the same weights. A sequence is [tokens, d_model]; there is no batch axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cpu_kernels.matrix import Matrix
from cpu_kernels.norm import layer_norm, rms_norm
from cpu_kernels.prompt_attention import prompt_attention
from cpu_kernels.rope import QKNorm
from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNRuntime, HybridFFN
from hybrid.model.gemm import linear, linear_few
from hybrid.model.kv_cache import KVCache
from hybrid.model.rope import Rotation, rotation, step_rotation
from profiler.common.spec import ModelSpec

OPT_POSITION_OFFSET = 2  # OPT's table of positions starts with two rows that are never used
_NONE = np.empty(0, np.float32)


class Linear(nn.Module):
    """y = x W^T + b for several tokens, W in its stored type."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None, runtime: FFNRuntime) -> None:
        super().__init__()
        self.matrix, self.runtime = matrix, runtime
        self.bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        runtime = self.runtime
        if x.shape[0] <= runtime.few:
            return linear_few(x, self.matrix, self.bias, runtime.pool)
        return linear(x, self.matrix, self.bias, runtime.pool, runtime.gemm)


class Norm(nn.Module):
    """RMSNorm (no bias) or LayerNorm over the last axis."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight.float().contiguous(), eps
        self.bias = None if bias is None else bias.float().contiguous()

    def forward(self, x: torch.Tensor, pool: WorkerPool) -> torch.Tensor:
        """x: [t, d] f32."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        given, weight = np.ascontiguousarray(x.numpy()), self.weight.numpy()
        if self.bias is None:
            rms_norm(given, weight, self.eps, out.numpy(), pool)
        else:
            layer_norm(given, weight, self.bias.numpy(), self.eps, out.numpy(), pool)
        return out


class Attention(nn.Module):
    """Grouped-query attention with optional biases, norms of q and k, RoPE and sliding window.

    rope: which of the model's rotations it takes.
    """

    def __init__(
        self, spec: ModelSpec, layer: int, qkv: Linear, out: Linear, q_norm: Norm | None, k_norm: Norm | None
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.q_norm, self.k_norm = qkv, out, q_norm, k_norm
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, spec.n_heads, spec.n_kv_heads, spec.head_dim
        self.window = spec.sliding_window if spec.sliding_layers and spec.sliding_layers[layer] else None
        self.rope = int(bool(spec.other_rope_layers) and spec.other_rope_layers[layer])
        self._norm = _qk_norm(q_norm, k_norm)

    def forward(self, x: torch.Tensor, rotations: tuple[Rotation, ...], cache: KVCache | None) -> torch.Tensor:
        """x: [t, d]; `rotations` as `Transformer.rotations` gives them; returns [t, d].

        Raises `ContextError` when the cache has no room for the tokens.
        """
        return self.out(self.attend(self.qkv(x), rotations, cache))

    def attend(self, qkv: torch.Tensor, rotations: tuple[Rotation, ...], cache: KVCache | None) -> torch.Tensor:
        """[t, heads * head_dim] of `qkv` [t, (heads + 2 kv_heads) * head_dim], which is overwritten."""
        tokens, runtime = qkv.shape[0], self.qkv.runtime
        out = torch.empty(tokens, self.heads * self.head_dim)
        turned = rotations[self.rope] if rotations else (torch.empty(tokens, 0),) * 2
        cos, sin = (angle.contiguous().numpy() for angle in turned)
        if cache is None:  # keys and values of these tokens alone, in f32
            start, table, scales = 0, np.zeros(1, np.int32), None
            stored = np.empty((1, 2, self.kv_heads, tokens, self.head_dim), np.float32)
        else:
            start, table, stored = cache.length, cache.table, cache.data[self.layer]
            scales = None if cache.scales is None else cache.scales[self.layer]
            cache.reserve_or_raise(start + tokens)
        prompt_attention(
            qkv.numpy(), (cos, sin), self._norm, stored, table, start, self.window, out.numpy(),
            runtime.pool, runtime.attention, scales,
        )  # fmt: skip
        return out


def _qk_norm(q: Norm | None, k: Norm | None) -> QKNorm:
    """The norms as the kernel takes them."""
    if q is None or k is None:
        return QKNorm(_NONE, _NONE, 0.0)
    biases = (_NONE if norm.bias is None else norm.bias.contiguous().numpy() for norm in (q, k))
    return QKNorm(q.weight.contiguous().numpy(), k.weight.contiguous().numpy(), q.eps, *biases)


@dataclass(frozen=True, eq=False)
class LayerNorms:
    """The norms of a layer; None for those that it does not have."""

    attention: Norm | None
    ffn: Norm | None
    attention_post: Norm | None = None
    ffn_post: Norm | None = None


class Block(nn.Module):
    """One layer: norm, attention, norm, residual, norm, FFN, norm, residual; or both beside each other."""

    def __init__(self, norms: LayerNorms, attention: Attention, ffn: HybridFFN, parallel: bool = False) -> None:
        super().__init__()
        self.norms, self.attention, self.ffn, self.parallel = norms, attention, ffn, parallel

    def forward(self, x: torch.Tensor, rotations: tuple[Rotation, ...], cache: KVCache | None) -> torch.Tensor:
        norms = self.norms
        after = self._normed(norms.attention_post, self.attention(self._normed(norms.attention, x), rotations, cache))
        after += x  # new memory costs more than the sum
        out = self._normed(norms.ffn_post, self.ffn(self._normed(norms.ffn, x if self.parallel else after)))
        out += after
        return out

    def _normed(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        return x if norm is None else norm(x, self.ffn.runtime.pool)


class Transformer(nn.Module):
    """The whole model. `forward` gives final hidden states; `logits` applies the head to some of them."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Matrix,
        positions: Matrix | None,
        blocks: list[Block],
        final_norm: Norm,
        head: Linear,
    ) -> None:
        super().__init__()
        self.spec, self.embedding, self.positions = spec, embedding, positions
        self.layers, self.blocks = nn.ModuleList(blocks), blocks
        self.ffns = [block.ffn for block in blocks]
        self.final_norm, self.head = final_norm, head
        self.ropes = [rope for rope in (spec.rope, spec.other_rope) if rope is not None]

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None, length: int | None = None) -> torch.Tensor:
        """tokens: int64 [t], following those in `cache`; returns [t, d_model] f32 after the final norm.

        length: of the text of which they are a part, where it goes on after them.
        """
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[0])
        x, rotations = self.embed(tokens.numpy(), start), self.rotations(positions, length)
        for layer in self.layers:
            x = layer(x, rotations, cache)
        if cache is not None:
            cache.advance(tokens.shape[0])
        return self.final_norm(x, self.ffns[0].runtime.pool)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [t, d_model]; returns [t, vocab_size] f32."""
        return self.capped(self.head(hidden))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in place, within what the model's cap leaves; the order of different ones stays."""
        cap = self.spec.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def embed(self, tokens: np.ndarray | int, start: int | np.ndarray) -> torch.Tensor:
        """What the first layer takes: a token, or int64 [t], at positions from `start` on, or at those of int64 [t], to
        f32 [t, d_model]."""
        # A slice for one: lists of rows take several times as long.
        at, ids = start + OPT_POSITION_OFFSET, slice(tokens, tokens + 1) if isinstance(tokens, int) else tokens
        x = self.embedding.widen(ids)
        if self.positions is not None:
            x = x + self.positions.widen(slice(at, at + len(x)) if isinstance(at, int) else at)
        if self.spec.embedding_scale != 1.0:
            x = x * self.spec.embedding_scale
        return F.rms_norm(x, x.shape[-1:], eps=self.spec.norm_eps) if self.spec.embedding_norm else x

    @torch.inference_mode()
    def load_kernels(self) -> None:
        """Compile what a prompt needs, or read it from its cache, by products with one row of each type of weights."""
        ffn, pool = self.ffns[0], self.ffns[0].runtime.pool
        attention, rotations = self.blocks[0].attention, self.rotations(torch.zeros(1, dtype=torch.int64))
        attention.attend(torch.zeros(1, attention.qkv.matrix.shape[0]), rotations, KVCache(self.spec, 1))
        self.final_norm(torch.zeros(1, self.spec.d_model), pool)
        matrices = {matrix.dtype: matrix for matrix in (self.blocks[0].attention.qkv.matrix, self.head.matrix, ffn.up)}
        for tokens in (1, ffn.runtime.few + 1):
            ffn.every(torch.zeros(tokens, self.spec.d_model), self.spec.d_ff - 1)
        for matrix in matrices.values():
            row = Matrix(matrix.rows[:1], matrix.columns)
            linear_few(torch.zeros(1, matrix.columns), row, None, pool)
            linear(torch.zeros(1, matrix.columns), row, None, pool, ffn.runtime.gemm)

    def rotations(self, positions: torch.Tensor, length: int | None = None) -> tuple[Rotation, ...]:
        """Cosines and sines [t, head_dim / 2] of each of the model's RoPEs, for positions of a text of `length` tokens,
        or one that ends with the last of them; none for learned positions."""
        length = length or int(positions[-1]) + 1
        return tuple(rotation(rope, self.spec.head_dim, positions, length) for rope in self.ropes)

    def step_rotations(self, capacity: int) -> tuple[Rotation, ...]:
        """Cosines and sines [capacity, head_dim / 2] for one token after another."""
        return tuple(step_rotation(rope, self.spec.head_dim, capacity) for rope in self.ropes)
