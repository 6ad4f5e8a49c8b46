"""What an engine keeps on the GPU: dense parts, what names neurons, hot ones and KV cache of its layers, and the head.

Weights are byte for byte those of the CPU's matrices. Everything comes out of one `DeviceArena`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels.matrix import Matrix
from gpu_kernels.certificate import DeviceCertificateView
from gpu_kernels.low_rank import DevicePredictorView
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.norm import residual_norm
from gpu_kernels.proxy import DeviceProxyView
from gpu_kernels.sparse_ffn import DeviceFFNView
from hybrid.model.ffn import FFNMatrices, HybridFFN
from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Block, Norm, Transformer
from hybrid.runtime.gpu.arena import DeviceArena
from placement.placement import Placement
from profiler.common.spec import ModelSpec

DENSE, PREDICTORS, HOT, KV, HEAD = "dense weights", "predictors", "hot neurons", "KV cache", "head and final norm"
CERTIFICATES, PROXIES = "certificates", "proxies"


@dataclass(frozen=True, eq=False)
class GpuNorm:
    """f32 [d] weights of an RMSNorm, or with a bias of a LayerNorm; without either what it takes is left as it is."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None


class HeadNorms(NamedTuple):
    """f32 [head_dim] weights of the norm of each head of q and of k, and their biases, or None."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """A layer's parts on the GPU. cache: f16, f32 or int8 [blocks, 2, kv_heads, block, head_dim]; scales: of int8, f32
    [blocks, 2, kv_heads, block]; ffn: its hot neurons, if any; zero_copy: those after them, whose rows kernels read in
    host memory; rope: which of the model's RoPEs; attention_post, ffn_post: norms of what is added to the residual, if
    any."""

    qkv: DeviceMatrix
    qkv_bias: torch.Tensor | None
    q_norm: GpuNorm | None
    k_norm: GpuNorm | None
    out: DeviceMatrix
    out_bias: torch.Tensor | None
    ffn_norm: GpuNorm
    attention_post: GpuNorm | None
    ffn_post: GpuNorm | None
    ffn: DeviceFFNView | None
    zero_copy: DeviceFFNView | None
    down_bias: torch.Tensor | None
    predictor: DevicePredictorView | None
    certificate: DeviceCertificateView | None
    proxy: DeviceProxyView | None
    cache: torch.Tensor
    scales: torch.Tensor | None
    window: int | None
    rope: int


@dataclass(frozen=True, eq=False)
class GpuWeights:
    """layers: None where a layer is on the CPU. norms: that which each layer begins with, on the CPU or not, and last
    the final norm. head: None where it is on the CPU."""

    layers: tuple[GpuLayer | None, ...]
    norms: tuple[GpuNorm, ...]
    head: DeviceMatrix | None

    @classmethod
    def take(
        cls,
        arena: DeviceArena,
        model: Transformer,
        placement: Placement,
        cache: KVCache,
        zero_copy: Mapping[int, FFNMatrices] = MappingProxyType({}),
    ) -> GpuWeights:
        """Copy what `placement` puts on the GPU. zero_copy: of some layers the neurons after the hot ones whose
        rows kernels may read in host memory."""
        layers = tuple(
            _layer(arena, model.spec, block, cache, zero_copy.get(number)) if placement.layer_on_gpu[number] else None
            for number, block in enumerate(model.blocks)
        )
        norms = [_norm(arena, block.norms.attention) for block in model.blocks]
        norms.append(_norm(arena, model.final_norm, HEAD))
        head = _matrix(arena, HEAD, model.head.matrix) if placement.head_on_gpu else None
        return cls(layers, tuple(norms), head)


def _layer(
    arena: DeviceArena, spec: ModelSpec, block: Block, cache: KVCache, zero_copy: FFNMatrices | None
) -> GpuLayer:
    attention, ffn = block.attention, block.ffn
    return GpuLayer(
        qkv=_matrix(arena, DENSE, attention.qkv.matrix),
        qkv_bias=_vector(arena, attention.qkv.bias),
        q_norm=None if attention.q_norm is None else _norm(arena, attention.q_norm),
        k_norm=None if attention.k_norm is None else _norm(arena, attention.k_norm),
        out=_matrix(arena, DENSE, attention.out.matrix),
        out_bias=_vector(arena, attention.out.bias),
        ffn_norm=_norm(arena, block.norms.ffn),
        attention_post=None if block.norms.attention_post is None else _norm(arena, block.norms.attention_post),
        ffn_post=None if block.norms.ffn_post is None else _norm(arena, block.norms.ffn_post),
        ffn=_hot(arena, ffn) if ffn.hot else None,
        zero_copy=None if zero_copy is None else _zero_copy(arena, zero_copy, ffn.act.name),
        down_bias=_vector(arena, ffn.matrices.down_bias),
        predictor=_predictor(arena, ffn),
        certificate=_certificate(arena, ffn),
        proxy=_proxy(arena, ffn),
        cache=arena.empty(KV, tuple(cache.data.shape[1:]), torch.from_numpy(cache.data).dtype),
        scales=None if cache.scales is None else arena.empty(KV, tuple(cache.scales.shape[1:])),
        window=attention.window,
        rope=attention.rope,
    )


def _hot(arena: DeviceArena, ffn: HybridFFN) -> DeviceFFNView:
    m, hot = ffn.matrices, slice(0, ffn.hot)

    def rows(matrix: Matrix) -> DeviceMatrix:
        return _matrix(arena, HOT, matrix, hot)

    def biases(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else arena.put(HOT, bias[hot].float())

    gate = None if m.gate is None else rows(m.gate)
    return DeviceFFNView(gate, rows(m.up), rows(m.down), biases(m.gate_bias), biases(m.up_bias), ffn.act.name)


def _zero_copy(arena: DeviceArena, m: FFNMatrices, activation: str) -> DeviceFFNView:
    def rows(matrix: Matrix) -> DeviceMatrix:
        return DeviceMatrix(matrix.tensor(), matrix.columns, matrix.dtype)

    def biases(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else arena.put(HOT, bias.float())

    gate = None if m.gate is None else rows(m.gate)
    return DeviceFFNView(gate, rows(m.up), rows(m.down), biases(m.gate_bias), biases(m.up_bias), activation)


def _predictor(arena: DeviceArena, ffn: HybridFFN) -> DevicePredictorView | None:
    p = ffn.predictor
    if p is None:
        return None

    def put(part: np.ndarray) -> torch.Tensor:
        # A mapped file's array is read-only, which torch warns of; a counting arena needs only its shape.
        return arena.put(PREDICTORS, torch.from_numpy(np.empty_like(part) if arena.counts_only else part.copy()))

    first, second = (put(p.fc1), put(p.s1), put(p.b1)), (put(p.fc2), put(p.s2), put(p.b2))
    return DevicePredictorView(*first, *second, float(p.threshold), p.d)


def _proxy(arena: DeviceArena, ffn: HybridFFN) -> DeviceProxyView | None:
    p = ffn.proxy
    if p is None:
        return None
    gate = None if p.gate is None else _matrix(arena, PROXIES, p.gate)
    up, lengths = _matrix(arena, PROXIES, p.up), arena.put(PROXIES, torch.from_numpy(p.lengths))
    first, second = (None if b is None else arena.put(PROXIES, torch.from_numpy(b)) for b in (p.gate_bias, p.up_bias))
    return DeviceProxyView(gate, up, lengths, float(p.threshold), p.activation, first, second)


def _certificate(arena: DeviceArena, ffn: HybridFFN) -> DeviceCertificateView | None:
    found = ffn.certificate
    if found is None:
        return None
    slope, rest = (arena.put(CERTIFICATES, torch.from_numpy(part)) for part in (found.slope, found.rest))
    bias = arena.put(CERTIFICATES, torch.from_numpy(found.bias)) if len(found.bias) else None
    rows = _matrix(arena, CERTIFICATES, Matrix(found.rows, found.d))
    return DeviceCertificateView(rows, slope, rest, bias, float(found.threshold))


def _matrix(arena: DeviceArena, part: str, matrix: Matrix, rows: slice = slice(None)) -> DeviceMatrix:
    return DeviceMatrix(arena.put(part, matrix.tensor(rows)), matrix.columns, matrix.dtype)


def _norm(arena: DeviceArena, norm: Norm | None, part: str = DENSE) -> GpuNorm:
    if norm is None:
        return GpuNorm(None, None)
    return GpuNorm(arena.put(part, norm.weight), None if norm.bias is None else arena.put(part, norm.bias))


def _vector(arena: DeviceArena, vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else arena.put(DENSE, vector.float())


def normed_heads(qkv: torch.Tensor, layer: GpuLayer, spec: ModelSpec, eps: float) -> HeadNorms:
    """The norms of each head of q and k that `rope` is to apply.

    Where all heads of q have one norm, and those of k, these are applied here, in place.
    """
    if layer.q_norm is None or layer.k_norm is None:
        return HeadNorms()
    if spec.qk_norm != "all":
        return HeadNorms(layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.bias, layer.k_norm.bias)
    q, k = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    for norm, part in ((layer.q_norm, qkv[:, :q]), (layer.k_norm, qkv[:, q : q + k])):
        residual_norm(part, norm.weight, None, eps, part)
    return HeadNorms()
