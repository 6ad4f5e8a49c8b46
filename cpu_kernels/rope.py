"""RoPE of one token's queries and keys, with their norms before it; its keys and values go to the KV cache.

With a, b the first and second half of a head and c, s the cosines and sines of the position's angles, rotated is

    [a * c - b * s,  b * c + a * s]                                      (rotate-half, arXiv 2104.09864)

Threads: a head of q, k or v is one worker's, so the answer is the same for any number of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.lanes import as_stored, stored_view
from cpu_kernels.norm import layer_norm_row, rms_norm_row
from cpu_kernels.worker_pool import WorkerPool

Rotation = tuple[np.ndarray, np.ndarray]
_NO_BIAS = np.empty(0, np.float32)


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


@kernel
def rope_heads(worker, workers, qkv, rotation, norm, cache, table, position):  # type: ignore[no-untyped-def]
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
            for j in range(x.shape[0]):
                place[j] = as_stored(place, x[j])


def rope(
    qkv: np.ndarray,
    rotation: Rotation,
    norm: QKNorm,
    cache: np.ndarray,
    table: np.ndarray,
    position: int,
    pool: WorkerPool,
) -> None:
    """Rotate the queries and keys in `qkv` in place, and write keys and values to the cache at `position`.

    qkv: [n_heads + 2 * n_kv_heads, head_dim] f32, heads of q, then k, then v. rotation: cosines and sines
    [head_dim / 2] f32, or both of length 0 for a model without RoPE. cache: [blocks, 2, n_kv_heads, block_size,
    head_dim] f32 or f16, keys at 0 and values at 1; table: int32 ids of the sequence's blocks in order. Raises
    `ValueError` when shapes, types or the position do not fit.
    """
    _check(qkv, rotation, norm, cache, table)
    block_size = cache.shape[3]
    if not 0 <= position < table.size * block_size or not 0 <= table[position // block_size] < cache.shape[0]:
        raise ValueError(
            f"position {position} has no place in the KV cache: the table has {table.size} blocks of {block_size} "
            f"tokens, the cache {cache.shape[0]} blocks"
        )
    norms = (norm.q, norm.k, float(norm.eps), norm.q_bias, norm.k_bias)
    pool.run(rope_heads, pool.workers_for(qkv.nbytes), qkv, rotation, norms, stored_view(cache), table, position)


def rope_ref(
    qkv: np.ndarray,
    rotation: Rotation,
    norm: QKNorm,
    cache: np.ndarray,
    table: np.ndarray,
    position: int,
    pool: WorkerPool | None,
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
    cache[table[position // block_size], :, :, position % block_size] = k, v


def _as_complex(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def _as_halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.real, x.imag], axis=-1)


def _check(qkv: np.ndarray, rotation: Rotation, norm: QKNorm, cache: np.ndarray, table: np.ndarray) -> None:
    floats = (qkv, *rotation, norm.q, norm.k, norm.q_bias, norm.k_bias, cache)
    if any(a.dtype != np.float32 for a in floats[:-1]) or cache.dtype not in (np.float32, np.float16):
        raise ValueError(f"rope wants f32 arrays, a cache also of f16, got {', '.join(str(a.dtype) for a in floats)}")
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
