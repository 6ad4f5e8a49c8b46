"""RoPE of queries and keys, with their norms before it, and keys and values written to the KV cache.

With a, b the first and second half of a head and c, s the cosines and sines of the token's position, rotated is

    [a * c - b * s,  b * c + a * s]                                      (rotate-half, arXiv 2104.09864)

Some heads of a token are one program's: one in a decode step, more where there are many tokens. In int8 the codes of
its key or value are round(x / scale), scale = max |x| / 127: see `cpu_kernels.rope`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import MAX_BATCH
from gpu_kernels.launch import begin, options

CACHE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_ROUND = tl.constexpr(1.5 * 2**23)  # added and taken off, it leaves the nearest whole number, of halves the even one


@triton.jit
def _weight(q_norm, k_norm, at, mask, is_query, is_key):  # type: ignore[no-untyped-def]
    """The norm's weights of this head; 1 for a value."""
    of_query = tl.load(q_norm + at, mask=mask & is_query, other=1.0)
    return of_query * tl.load(k_norm + at, mask=mask & is_key, other=1.0)


@triton.jit
def _bias(q_bias, k_bias, at, mask, is_query, is_key):  # type: ignore[no-untyped-def]
    """The norm's biases of this head; 0 for a value."""
    of_query = tl.load(q_bias + at, mask=mask & is_query, other=0.0)
    return of_query + tl.load(k_bias + at, mask=mask & is_key, other=0.0)


@triton.jit
def _kept(x, cache):  # type: ignore[no-untyped-def]
    """x in the cache's type; f16 ends at 65504, beyond which it would be infinite."""
    if cache.dtype.element_ty == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(cache.dtype.element_ty)


@triton.jit
def _codes(x, scale):  # type: ignore[no-untyped-def]
    """x / scale as int8; beyond 127 it is where the scale is too small to be exact."""
    code = x / tl.where(scale > 0.0, scale, 1.0)
    return (tl.minimum(tl.maximum(code, -127.0), 127.0) + _ROUND - _ROUND).to(tl.int8)


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    q_bias,
    k_bias,
    eps,
    positions,
    table,
    table_stride,
    cache,
    scales,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    LAYER: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """Everything is [GROUP heads, PADDED_HALF columns], or [GROUP, 1]."""
    begin(PDL)
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    t, j = tl.program_id(0), tl.arange(0, PADDED_HALF)[None, :]
    h = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    head = h + tl.zeros_like(j)  # masks of one shape: not all versions of the interpreter mix them
    is_query, is_value = head < HEADS, (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    in_a, in_b = (j < HALF) & (is_query | is_key | is_value), (HALF + j < HEAD_DIM) & (is_query | is_key | is_value)
    x = qkv + (t * (HEADS + 2 * KV_HEADS) + h) * HEAD_DIM
    a = tl.load(x + j, mask=in_a, other=0.0)
    b = tl.load(x + HALF + j, mask=in_b, other=0.0)
    given = tl.load(positions + t)
    position, kept = tl.maximum(given, ~given), head * 0 + given >= 0
    block = tl.load(table + t * table_stride + position // BLOCK_SIZE).to(tl.int64)
    if LAYER:
        mean = (tl.sum(a, axis=1, keep_dims=True) + tl.sum(b, axis=1, keep_dims=True)) / HEAD_DIM
        mean = tl.where(is_value, 0.0, mean)
        a, b = tl.where(in_a, a - mean, 0.0), tl.where(in_b, b - mean, 0.0)
    if NORMED:
        squares = tl.sum(a * a, axis=1, keep_dims=True) + tl.sum(b * b, axis=1, keep_dims=True)
        scale = tl.where(is_value, 1.0, 1.0 / tl.sqrt(squares / HEAD_DIM + eps))
        a = a * scale * _weight(q_norm, k_norm, j, in_a, is_query, is_key)
        b = b * scale * _weight(q_norm, k_norm, HALF + j, in_b, is_query, is_key)
    if LAYER:
        a += _bias(q_bias, k_bias, j, in_a, is_query, is_key)
        b += _bias(q_bias, k_bias, HALF + j, in_b, is_query, is_key)
    if ROTATED:  # by no angle where it is a value
        turned = in_a & (is_query | is_key)
        c = tl.load(cos + position * HALF + j, mask=turned, other=1.0)
        s = tl.load(sin + position * HALF + j, mask=turned, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    tl.store(x + j, a, mask=in_a & is_query)
    tl.store(x + HALF + j, b, mask=in_b & is_query)
    row = (block * (2 * KV_HEADS) + (h - HEADS)) * BLOCK_SIZE + position % BLOCK_SIZE
    place = cache + row * HEAD_DIM
    if SCALED:
        largest = tl.maximum(tl.max(tl.abs(a), axis=1, keep_dims=True), tl.max(tl.abs(b), axis=1, keep_dims=True))
        # Not a number where one of them is not: max skips it.
        scale = largest / 127.0 + tl.sum(a * 0.0, axis=1, keep_dims=True) + tl.sum(b * 0.0, axis=1, keep_dims=True)
        tl.store(scales + row, scale, mask=(h >= HEADS) & (h < HEADS + 2 * KV_HEADS) & (h * 0 + given >= 0))
        a, b = _codes(a, scale), _codes(b, scale)
    else:
        a, b = _kept(a, cache), _kept(b, cache)
    tl.store(place + j, a, mask=in_a & (is_key | is_value) & kept)
    tl.store(place + HALF + j, b, mask=in_b & (is_key | is_value) & kept)


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    n_heads: int,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Rotate the queries in `qkv` in place, and write rotated keys and plain values of each token to the cache.

    qkv: [t, (n_heads + 2 * n_kv_heads) * head_dim] f32, heads of q, then k, then v; keys in it stay as they are. cos,
    sin: [capacity, head_dim / 2] f32, or None for a model without RoPE. q_norm, k_norm: weights [head_dim] f32 of an
    RMSNorm before it with `eps`, or None; q_bias, k_bias: [head_dim] f32 where that is a LayerNorm. positions: [t]
    int32, each within `table` (not checked: it is device memory), or for a position p whose key and value are not to be
    kept ~p, which is negative. table: [t, max_blocks] int32 ids of a token's blocks
    in order; the row stride may be 0. cache: [blocks, 2, n_kv_heads, block_size, head_dim] f32, f16 or bf16, or int8
    with `scales` f32 [blocks, 2, n_kv_heads, block_size], keys at 0 and values at 1. Raises `ValueError` when shapes,
    types or strides do not fit.
    """
    check_scales("rope", cache, scales)
    _check(qkv, cos, sin, (q_norm, k_norm, q_bias, k_bias), positions, table, cache, n_heads)
    kv_heads, block_size, head_dim = cache.shape[2:]
    group = 1 if qkv.shape[0] <= MAX_BATCH else 8
    _rope_kernel[(qkv.shape[0], triton.cdiv(n_heads + 2 * kv_heads, group))](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        q_bias,
        k_bias,
        float(eps),
        positions,
        table,
        table.stride(0),
        cache,
        scales,
        HEADS=n_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROTATED=cos is not None,
        NORMED=q_norm is not None,
        LAYER=q_bias is not None,
        SCALED=scales is not None,
        GROUP=group,
        PADDED_HALF=triton.next_power_of_2(-(-head_dim // 2)),
        **options(min(4, group)),
    )


def rope_ref(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    n_heads: int,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """`rope` in torch, in f64."""
    kv_heads, block_size, head_dim = cache.shape[2:]
    for t, given in enumerate(positions.tolist()):
        position = max(given, ~given)
        heads = qkv[t].double().view(-1, head_dim)
        q, k, v = heads.split([n_heads, kv_heads, kv_heads])
        if q_bias is not None:
            q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
        if q_norm is not None and k_norm is not None:
            q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w for x, w in ((q, q_norm), (k, k_norm)))
        if q_bias is not None and k_bias is not None:
            q, k = q + q_bias, k + k_bias
        if cos is not None and sin is not None:
            q, k = (_rotated(x, cos[position].double(), sin[position].double()) for x in (q, k))
        qkv[t, : n_heads * head_dim] = q.flatten()
        if given < 0:
            continue
        block, slot = int(table[t, position // block_size]), position % block_size
        kept = torch.stack((k, v))
        if scales is not None:
            of = kept.abs().amax(-1) / 127
            scales[block, :, :, slot] = of.float()
            kept = (kept / torch.where(of > 0, of, 1.0)[..., None]).round()
        cache[block, :, :, slot] = kept.to(cache.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norms: tuple[torch.Tensor | None, ...],
    positions: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    n_heads: int,
) -> None:
    floats = [a for a in (qkv, cos, sin, *norms) if a is not None]
    if any(a.dtype != torch.float32 or not a.is_contiguous() for a in floats):
        raise ValueError(f"rope wants contiguous f32 tensors, got {', '.join(str(a.dtype) for a in floats)}")
    if cache.ndim != 5 or cache.shape[1] != 2 or cache.dtype not in CACHE_TYPES or not cache.is_contiguous():
        raise ValueError(
            f"rope wants a contiguous f32, f16, bf16 or int8 cache [blocks, 2, n_kv_heads, block_size, head_dim], "
            f"got {cache.dtype} {tuple(cache.shape)}"
        )
    tokens, head_dim = qkv.shape[0], cache.shape[4]
    fits = qkv.ndim == 2 and n_heads >= 1 and qkv.shape[1] == (n_heads + 2 * cache.shape[2]) * head_dim
    fits = fits and all(norm is None or norm.shape == (head_dim,) for norm in norms)
    q_norm, k_norm, q_bias, k_bias = (norm is not None for norm in norms)
    fits = fits and q_norm == k_norm and q_bias == k_bias <= q_norm and (cos is None) == (sin is None)
    if cos is not None and sin is not None:
        fits = fits and cos.ndim == 2 and cos.shape == sin.shape and 2 * cos.shape[1] == head_dim
    if not fits:
        shapes = ", ".join(str(None if a is None else tuple(a.shape)) for a in (qkv, cos, sin, *norms, cache))
        raise ValueError(f"rope shapes do not fit {n_heads} heads: qkv, cos, sin, norms of q, k, cache are {shapes}")
    check_places("rope", tokens, positions, table)


def check_scales(name: str, cache: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Raises `ValueError` when kernel `name` gets an int8 cache without its scales, or scales of another."""
    if scales is None and cache.dtype != torch.int8:
        return
    fits = scales is not None and cache.dtype == torch.int8 and scales.shape == cache.shape[:4]
    if scales is None or not fits or scales.dtype != torch.float32 or not scales.is_contiguous():
        found = "none" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise ValueError(
            f"{name} wants contiguous f32 scales {tuple(cache.shape[:4])} beside an int8 cache alone, "
            f"got {found} beside {cache.dtype}"
        )


def check_places(name: str, tokens: int, positions: torch.Tensor, table: torch.Tensor) -> None:
    """Raises `ValueError` when positions [t] and the block table [t, max_blocks] do not fit kernel `name`'s tokens."""
    fits = positions.shape == (tokens,) and table.ndim == 2 and table.shape[0] == tokens and table.shape[1] >= 1
    if not fits or positions.stride(0) != 1 or table.stride(1) != 1 or {positions.dtype, table.dtype} != {torch.int32}:
        raise ValueError(
            f"{name} wants int32 positions [{tokens}] and a block table [{tokens}, max_blocks] int32 with contiguous "
            f"rows, got {positions.dtype} {tuple(positions.shape)}, {table.dtype} {tuple(table.shape)}"
        )
