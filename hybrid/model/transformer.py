"""The transformer: one class for every family, driven by its `ModelSpec`; f32 activations over stored weights.

This is the way of many tokens at once: prefill, profiling, evaluation. An answer's tokens go one by one through
`hybrid.runtime.cpu_step`, which computes the same in one compiled call.

Weights keep their stored type and are widened to f32 where they are used, so a bf16 checkpoint computes the same
numbers as f32 arithmetic on the same weights. A sequence is [tokens, d_model]; there is no batch axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from cpu_kernels.matrix import Matrix
from hybrid.model.ffn import FFNRuntime, HybridFFN
from hybrid.model.gemm import linear, linear_few, widened
from hybrid.model.kv_cache import KVCache
from profiler.common.spec import ModelSpec, RopeSpec

OPT_POSITION_OFFSET = 2  # OPT's table of positions starts with two rows that are never used


class Linear(nn.Module):
    """y = x W^T + b for several tokens, W in its stored type."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None, runtime: FFNRuntime) -> None:
        super().__init__()
        self.matrix, self.runtime = matrix, runtime
        self.bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = linear_few if x.shape[0] <= self.runtime.few else linear
        return product(x, self.matrix, self.bias, self.runtime.pool)


class Norm(nn.Module):
    """RMSNorm (no bias) or LayerNorm over the last axis."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight.float(), eps
        self.bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rope_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Angles per position of each rotated pair, [head_dim / 2] f32, with the scaling that `rope` names."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "plain":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    # Llama 3: long wavelengths are divided by the factor, short ones kept, those between blended.
    wavelength = 2 * math.pi / base
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    blend = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(wavelength > low, base / rope.factor, base)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


class Attention(nn.Module):
    """Grouped-query attention with optional biases, QK norm, RoPE and sliding window."""

    def __init__(
        self, spec: ModelSpec, layer: int, qkv: Linear, out: Linear, q_norm: Norm | None, k_norm: Norm | None
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.q_norm, self.k_norm = qkv, out, q_norm, k_norm
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, spec.n_heads, spec.n_kv_heads, spec.head_dim
        self.window = spec.sliding_window if spec.sliding_layers and spec.sliding_layers[layer] else None

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None, cache: KVCache | None
    ) -> torch.Tensor:
        """x: [t, d]; `rotation` holds cosines and sines [t, 1, head_dim / 2]; returns [t, d]."""
        tokens, start = x.shape[0], cache.length if cache is not None else 0
        split = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).view(tokens, sum(split), self.head_dim).split(split, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        keys, values = cache.append(self.layer, k, v) if cache is not None else (k.transpose(0, 1), v.transpose(0, 1))
        if tokens == 1 and self.window is not None:
            keys, values = keys[:, -self.window :], values[:, -self.window :]
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=self._mask(tokens, start),
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(y[0].transpose(0, 1).reshape(tokens, -1))

    def _mask(self, tokens: int, start: int) -> torch.Tensor | None:
        """True where a query may look: not ahead, and not behind the window. None for one token, which sees all."""
        if tokens == 1:
            return None
        ahead = (start + torch.arange(tokens))[:, None] - torch.arange(start + tokens)[None, :]
        visible = ahead >= 0
        return visible if self.window is None else visible & (ahead < self.window)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Block(nn.Module):
    """One layer: norm, attention, residual, norm, FFN, residual."""

    def __init__(self, attention_norm: Norm, attention: Attention, ffn_norm: Norm, ffn: HybridFFN) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.ffn_norm, self.ffn = attention_norm, attention, ffn_norm, ffn

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None, cache: KVCache | None
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        return x + self.ffn(self.ffn_norm(x))


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
        self._frequencies = rope_frequencies(spec.rope, spec.head_dim) if spec.rope else None

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """tokens: int64 [t], following those in `cache`; returns [t, d_model] f32 after the final norm."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[0])
        x = self.embedding.widen(tokens.numpy())
        if self.positions is not None:
            x = x + self.positions.widen((positions + OPT_POSITION_OFFSET).numpy())
        rotation = self.rotation(positions)
        for layer in self.layers:
            x = layer(x, rotation, cache)
        if cache is not None:
            cache.advance(tokens.shape[0])
        return self.final_norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [t, d_model]; returns [t, vocab_size] f32."""
        return self.head(hidden)

    @torch.inference_mode()
    def load_kernels(self) -> None:
        """Compile what a prompt needs, or read it from its cache, by products with one row of each type of weights."""
        ffn, pool = self.ffns[0], self.ffns[0].runtime.pool
        matrices = {matrix.dtype: matrix for matrix in (self.blocks[0].attention.qkv.matrix, self.head.matrix, ffn.up)}
        ffn.every(torch.zeros(2, self.spec.d_model), self.spec.d_ff - 1)
        for matrix in matrices.values():
            row = Matrix(matrix.rows[:1], matrix.columns)
            linear_few(torch.zeros(2, matrix.columns), row, None, pool)
            widened(row, slice(1), pool)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines [t, 1, head_dim / 2] of the positions' angles; None for a model without RoPE."""
        if self._frequencies is None:
            return None
        angles = torch.outer(positions.float(), self._frequencies)[:, None, :]
        return angles.cos(), angles.sin()
