"""RoPE of one token's queries and keys, with their norms before it; its keys and values go to the KV cache.

With a, b the first and second half of a head and c, s the cosines and sines of the position's angles, rotated is

    [a * c - b * s,  b * c + a * s]                                      (rotate-half, arXiv 2104.09864)

In int8 the codes of a token's key or value of one head are round(x / scale), scale = max |x| / 127. The scale is the
token's own: one for a block would change while the block fills, and its codes with it, by how a prompt was cut.

Threads: a head of q, k or v is one worker's, so the answer is the same for any number of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.lanes import as_stored, stored_view
from cpu_kernels.norm import layer_norm_row, rms_norm_row
from cpu_kernels.worker_pool import WorkerPool

Rotation = tuple[np.ndarray, np.ndarray]
_NO_BIAS = np.empty(0, np.float32)
_LARGEST_CODE = np.float32(127)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves a whole number in the low bits of an f32


class QKNorm(NamedTuple):
    """Weights f32 [head_dim] of the norm of each head of q and of k, or of length 0 for none; eps; the same of biases,
    where it is LayerNorm rather than RMSNorm."""

    q: np.ndarray
    k: np.ndarray
    eps: float
    q_bias: np.ndarray = _NO_BIAS
    k_bias: np.ndarray = _NO_BIAS


@subroutine(fastmath={"contract"})
def _rotate_head(x, cos, sin):  # type: ignore[no-untyped-def]
    half = cos.shape[0]
    for j in range(half):
        first, second = x[j], x[half + j]
        x[j] = first * cos[j] - second * sin[j]
        x[half + j] = second * cos[j] + first * sin[j]


@subroutine
def _put_codes(x, codes):  # type: ignore[no-untyped-def]
    """codes = x / scale, halves to even; returns the scale, which is not a number where some x is not."""
    bits = np.int32(0)
    for j in range(x.shape[0]):  # as integers: the bits of a NaN are larger than any number's
        bits = max(bits, np.int32(np.float32(x[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
    scale = np.int32(bits).view(np.float32) / _LARGEST_CODE
    divisor = scale if scale > 0 else np.float32(1)
    for j in range(x.shape[0]):  # beyond 127 where the scale is too small to be exact
        code = max(-_LARGEST_CODE, min(_LARGEST_CODE, x[j] / divisor))
        codes[j] = np.int8(np.float32(code + _ROUND).view(np.int32))
    return scale


def _store(x: np.ndarray, place: np.ndarray, scales: np.ndarray | None, at: tuple[int, ...]) -> None:
    """Write a key or value to its place, and the scale of its codes, if it has one, to scales[at]."""
    raise NotImplementedError("called from compiled code only")


@overload(_store, strict=False, jit_options={"nogil": True, "forceinline": True})
def _store_type(x: Any, place: Any, scales: Any, at: Any) -> Any:
    def as_floats(x, place, scales, at):  # type: ignore[no-untyped-def]
        for j in range(x.shape[0]):
            place[j] = as_stored(place, x[j])

    def as_codes(x, place, scales, at):  # type: ignore[no-untyped-def]
        scales[at] = _put_codes(x, place)

    return as_floats if scales == types.none else as_codes


@kernel
def rope_heads(worker, workers, qkv, rotation, norm, cache, scales, table, position):  # type: ignore[no-untyped-def]
    """This worker's heads of `rope`; arguments as there."""
    total, kv_heads, block_size = qkv.shape[0], cache.shape[2], cache.shape[3]
    heads = total - 2 * kv_heads
    block, slot = table[position // block_size], position % block_size
    cos, sin = rotation
    q_norm, k_norm, eps, q_bias, k_bias = norm
    for h in range(total * worker // workers, total * (worker + 1) // workers):
        x = qkv[h]
        if h < heads + kv_heads:
            if q_norm.shape[0] and q_bias.shape[0]:
                layer_norm_row(x, q_norm if h < heads else k_norm, q_bias if h < heads else k_bias, eps, x)
            elif q_norm.shape[0]:
                rms_norm_row(x, q_norm if h < heads else k_norm, eps, x)
            _rotate_head(x, cos, sin)
        if h >= heads:
            is_value, head = divmod(h - heads, kv_heads)
            place = cache[block, is_value, head, slot]
            _store(x, place, scales, (block, is_value, head, slot))


def rope(
    qkv: np.ndarray,
    rotation: Rotation,
    norm: QKNorm,
    cache: np.ndarray,
    table: np.ndarray,
    position: int,
    pool: WorkerPool,
    scales: np.ndarray | None = None,
) -> None:
    """Rotate the queries and keys in `qkv` in place, and write keys and values to the cache at `position`.

    qkv: [n_heads + 2 * n_kv_heads, head_dim] f32, heads of q, then k, then v. rotation: cosines and sines
    [head_dim / 2] f32, or both of length 0 for a model without RoPE. cache: [blocks, 2, n_kv_heads, block_size,
    head_dim] f32 or f16, or int8 with `scales` f32 [blocks, 2, n_kv_heads, block_size], keys at 0 and values at 1;
    table: int32 ids of the sequence's blocks in order. Raises `ValueError` when shapes, types or the position do not
    fit.
    """
    _check(qkv, rotation, norm, cache, table)
    check_scales("rope", cache, scales)
    block_size = cache.shape[3]
    if not 0 <= position < table.size * block_size or not 0 <= table[position // block_size] < cache.shape[0]:
        raise ValueError(
            f"position {position} has no place in the KV cache: the table has {table.size} blocks of {block_size} "
            f"tokens, the cache {cache.shape[0]} blocks"
        )
    norms = (norm.q, norm.k, float(norm.eps), norm.q_bias, norm.k_bias)
    stored = stored_view(cache), scales
    pool.run(rope_heads, pool.workers_for(qkv.nbytes), qkv, rotation, norms, *stored, table, position)


def rope_ref(
    qkv: np.ndarray,
    rotation: Rotation,
    norm: QKNorm,
    cache: np.ndarray,
    table: np.ndarray,
    position: int,
    pool: WorkerPool | None,
    scales: np.ndarray | None = None,
) -> None:
    """`rope` in NumPy, in f64."""
    (cos, sin), (q_norm, k_norm, eps, q_bias, k_bias) = rotation, norm
    kv_heads, block_size = cache.shape[2:4]
    q, k, v = np.split(qkv.astype(np.float64), [len(qkv) - 2 * kv_heads, len(qkv) - kv_heads])
    if q_bias.size:
        q, k = (x - x.mean(-1, keepdims=True) for x in (q, k))
    if q_norm.size:
        q, k = (x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * w for x, w in ((q, q_norm), (k, k_norm)))
    if q_bias.size:
        q, k = q + q_bias, k + k_bias
    if cos.size:
        turn = np.exp(1j * np.arctan2(sin.astype(np.float64), cos)) * np.hypot(cos, sin, dtype=np.float64)
        q, k = (_as_halves(_as_complex(x) * turn) for x in (q, k))
    qkv[:] = np.concatenate([q, k, v])
    block, slot = table[position // block_size], position % block_size
    kept = np.stack([k, v])
    if scales is not None:
        of = np.abs(kept).max(-1) / 127
        scales[block, :, :, slot] = of
        kept = np.rint(kept / np.where(of > 0, of, 1)[..., None])
    cache[block, :, :, slot] = kept


def _as_complex(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def _as_halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.real, x.imag], axis=-1)


def check_scales(name: str, cache: np.ndarray, scales: np.ndarray | None) -> None:
    """Raises `ValueError` when kernel `name` gets an int8 cache without its scales, or scales of another."""
    if scales is None and cache.dtype != np.int8:
        return
    if scales is None or cache.dtype != np.int8 or scales.shape != cache.shape[:4] or scales.dtype != np.float32:
        found = "none" if scales is None else f"{scales.dtype} {scales.shape}"
        raise ValueError(
            f"{name} wants f32 scales {cache.shape[:4]} beside an int8 cache alone, got {found} beside {cache.dtype}"
        )
    if not scales.flags.c_contiguous:
        raise ValueError(f"{name} wants C-contiguous scales, got strides {scales.strides}")


def _check(qkv: np.ndarray, rotation: Rotation, norm: QKNorm, cache: np.ndarray, table: np.ndarray) -> None:
    floats = (qkv, *rotation, norm.q, norm.k, norm.q_bias, norm.k_bias, cache)
    if any(a.dtype != np.float32 for a in floats[:-1]) or cache.dtype not in (np.float32, np.float16, np.int8):
        raise ValueError(
            f"rope wants f32 arrays, a cache also of f16 or int8, got {', '.join(str(a.dtype) for a in floats)}"
        )
    if not all(a.flags.c_contiguous for a in floats):
        raise ValueError(f"rope wants C-contiguous arrays, got strides {', '.join(str(a.strides) for a in floats)}")
    if table.dtype != np.int32 or table.ndim != 1:
        raise ValueError(f"rope wants an int32 block table of one axis, got {table.dtype} {table.shape}")
    head_dim = qkv.shape[-1]
    fits = qkv.ndim == 2 and cache.ndim == 5 and cache.shape[1] == 2 and cache.shape[4] == head_dim
    fits = fits and len(qkv) > 2 * cache.shape[2] and rotation[0].shape == rotation[1].shape
    fits = fits and (rotation[0].shape == (0,) or (head_dim % 2 == 0 and rotation[0].shape == (head_dim // 2,)))
    fits = fits and norm.q.shape == norm.k.shape and norm.q.shape in ((head_dim,), (0,))
    fits = fits and norm.q_bias.shape == norm.k_bias.shape and norm.q_bias.shape in (norm.q.shape, (0,))
    if not fits:
        shapes = ", ".join(str(a.shape) for a in floats)
        raise ValueError(
            f"rope shapes do not fit: qkv, cosines, sines, norms of q and k, their biases, cache: {shapes}"
        )
