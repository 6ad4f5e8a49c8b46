"""A prompt's attention in one call: norms of q and k, RoPE, their keys and values to the KV cache, attention over it.

    out[t, h] = sum over i of  p[i] * V[i],     p = softmax over i of  q[t, h] . K[i] / sqrt(head_dim)

for the positions i that t sees, itself and those before, at most `window`, with the keys and values of KV head
h // (n_heads // n_kv_heads) as they are stored. Keys and values are written by the code of decode (`rope.py`), and read
where they lie, 128 positions at a time (`attention_tiles.py`): nothing grows with the square of a prompt's tokens.

Threads: workers share the tokens, meet once all keys and values are written, and take units of up to 192 query rows of
one KV head until none is left, those that see the most first. A token's answer has the same bits with any number of
workers, in any piece of a prompt, and wherever the blocks of the cache lie.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.attention import decode_attention_ref
from cpu_kernels.attention_tiles import ROWS, attend_unit, new_own
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.lanes import stored_view
from cpu_kernels.norm import layer_norm_row, rms_norm_row
from cpu_kernels.rope import QKNorm, Rotation, check_scales, rope_heads, rope_ref
from cpu_kernels.tiles import TOKENS
from cpu_kernels.worker_pool import Each, WorkerPool

_TOKENS_AT_ONCE = 8  # of which a worker writes keys and values
_UNITS_EACH = 4  # of a worker, where that takes no units of fewer than 48 rows
_NONE = np.empty(0, np.float32)


@subroutine
def _norm_all(x, weight, bias, eps):  # type: ignore[no-untyped-def]
    """The norm of all heads of a token as one, in place."""
    if bias.shape[0]:
        layer_norm_row(x, weight, bias, eps, x)
    else:
        rms_norm_row(x, weight, eps, x)


@subroutine
def _write_tokens(state, qkv, heads, rotation, norm, all_heads, cache, scales, table, start):  # type: ignore[no-untyped-def]
    """Queries normed and rotated in place, keys and values in the cache; workers share the tokens."""
    (cos, sin), head_dim, one = rotation, cache.shape[4], np.int64(1)
    q_width = qkv.shape[1] - 2 * cache.shape[2] * head_dim
    k_end = q_width + cache.shape[2] * head_dim
    q_all, k_all, eps, q_bias, k_bias = all_heads
    first = barrier.take(state) * _TOKENS_AT_ONCE
    while first < qkv.shape[0]:
        for t in range(first, min(first + _TOKENS_AT_ONCE, qkv.shape[0])):
            if q_all.shape[0]:
                _norm_all(qkv[t, :q_width], q_all, q_bias, eps)
                _norm_all(qkv[t, q_width:k_end], k_all, k_bias, eps)
            rope_heads(one - 1, one, heads[t], (cos[t], sin[t]), norm, cache, scales, table, start + t)
        first = barrier.take(state) * _TOKENS_AT_ONCE


@kernel
def _prompt_attention(  # type: ignore[no-untyped-def]
    worker, workers, state, qkv, heads, rotation, norm, all_heads, cache, scales, table, start, window, most, own, out
):
    _write_tokens(state, qkv, heads, rotation, norm, all_heads, cache, scales, table, start)
    if not barrier.wait(state, workers):
        return
    kv_heads = cache.shape[2]
    rows = qkv.shape[0] * (out.shape[1] // kv_heads)
    units = -(-rows // most)
    unit = barrier.take(state)
    while unit < units * kv_heads:
        first = (units - 1 - unit // kv_heads) * most
        count = min(most, rows - first)
        attend_unit(heads, cache, scales, table, unit % kv_heads, first, count, start, window, own, out)
        unit = barrier.take(state)


class PromptScratch:
    """The workers' buffers, which grow as they are asked for; for one call at a time."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._head_dim, self._owns = 0, Each()

    def owns(self, head_dim: int) -> Each:
        """Each worker's own."""
        if head_dim > self._head_dim:
            self._head_dim, self._owns = head_dim, Each(new_own(head_dim) for _ in range(self._threads))
        return self._owns


def prompt_attention(
    qkv: np.ndarray,
    rotation: Rotation,
    norm: QKNorm,
    cache: np.ndarray,
    table: np.ndarray,
    start: int,
    window: int | None,
    out: np.ndarray,
    pool: WorkerPool,
    scratch: PromptScratch,
    scales: np.ndarray | None = None,
) -> None:
    """out [t, n_heads * head_dim] f32 of the tokens at positions from `start` on, whose keys and values join the cache.

    qkv: [t, (n_heads + 2 * n_kv_heads) * head_dim] f32, heads of q, then k, then v; afterwards its queries and keys are
    normed and rotated. rotation: cosines and sines [t, head_dim / 2] f32, or [t, 0]. norm: as for `rope`, or weights
    and biases of all heads as one. cache, table, scales: as for `rope`; what comes before `start` has been written.
    Raises `ValueError` when shapes, types, positions or block ids do not fit.
    """
    _check(qkv, rotation, norm, cache, out)
    check_scales("prompt_attention", cache, scales)
    tokens, kv_heads, head_dim = len(qkv), cache.shape[2], cache.shape[4]
    _check_places(tokens, cache, table, start, window)
    if not tokens:
        return
    of_all = norm.q.size not in (0, head_dim)
    norms = norm._replace(q=_NONE, k=_NONE, q_bias=_NONE, k_bias=_NONE) if of_all else norm
    all_heads = norm if of_all else norm._replace(q=_NONE, k=_NONE, q_bias=_NONE, k_bias=_NONE)
    heads, answers = qkv.reshape(tokens, -1, head_dim), out.reshape(tokens, -1, head_dim)
    most = _unit_rows(tokens * answers.shape[1] // kv_heads, kv_heads, pool.threads)
    stored = stored_view(cache), scales, table
    pool.run(
        _prompt_attention, pool.threads, pool.barrier, qkv, heads, rotation, _plain(norms), _plain(all_heads), *stored,
        start, window or 0, most, scratch.owns(head_dim), answers,
    )  # fmt: skip


def _plain(norm: QKNorm) -> tuple[np.ndarray, np.ndarray, float, np.ndarray, np.ndarray]:
    """As decode passes it to `rope_heads`, which is compiled for it once."""
    return norm.q, norm.k, float(norm.eps), norm.q_bias, norm.k_bias


def _unit_rows(rows: int, kv_heads: int, workers: int) -> int:
    """Rows of a unit, whole tiles: equal parts of a KV head's, enough to go round."""
    wanted = -(-_UNITS_EACH * workers // kv_heads)
    parts = max(-(-rows // ROWS), min(wanted, rows // (ROWS // 4)))
    return -(-rows // (parts * TOKENS)) * TOKENS


def prompt_attention_ref(
    qkv: np.ndarray,
    rotation: Rotation,
    norm: QKNorm,
    cache: np.ndarray,
    table: np.ndarray,
    start: int,
    window: int | None,
    out: np.ndarray,
    scales: np.ndarray | None = None,
) -> None:
    """`prompt_attention` in NumPy, a token at a time, in f64."""
    kv_heads, _, head_dim = cache.shape[2:]
    width = qkv.shape[1] - 2 * kv_heads * head_dim
    if norm.q.size not in (0, head_dim):
        both = (norm.q, norm.q_bias), (norm.k, norm.k_bias)
        for x, (weight, bias) in zip(np.split(qkv, [width, width + kv_heads * head_dim], axis=1), both, strict=False):
            wide = x.astype(np.float64) - (x.mean(1, keepdims=True) if bias.size else 0)
            x[:] = wide / np.sqrt(np.square(wide).mean(1, keepdims=True) + norm.eps) * weight
            x += bias if bias.size else 0
        norm = norm._replace(q=_NONE, k=_NONE, q_bias=_NONE, k_bias=_NONE)
    for t, row in enumerate(qkv):
        heads, angles = row.reshape(-1, head_dim), (rotation[0][t], rotation[1][t])
        rope_ref(heads, angles, norm, cache, table, start + t, None, scales)
        queries, answer = heads[: width // head_dim], out[t].reshape(-1, head_dim)
        decode_attention_ref(queries, cache, table, start + t + 1, window, answer, None, scales)


def _check(qkv: np.ndarray, rotation: Rotation, norm: QKNorm, cache: np.ndarray, out: np.ndarray) -> None:
    floats = (qkv, *rotation, norm.q, norm.k, norm.q_bias, norm.k_bias, out)
    if any(a.dtype != np.float32 for a in floats) or cache.dtype not in (np.float32, np.float16, np.int8):
        found = ", ".join(str(a.dtype) for a in (*floats, cache))
        raise ValueError(f"prompt_attention wants f32 arrays and a cache of f32, f16 or int8, got {found}")
    if not all(a.flags.c_contiguous for a in (*floats, cache)):
        found = ", ".join(str(a.strides) for a in (*floats, cache))
        raise ValueError(f"prompt_attention wants C-contiguous arrays, got strides {found}")
    fits = qkv.ndim == out.ndim == 2 and cache.ndim == 5 and cache.shape[1] == 2 and len(qkv) == len(out)
    if fits:
        kv_heads, head_dim = cache.shape[2], cache.shape[4]
        q, k = out.shape[1], kv_heads * head_dim
        fits = q > 0 and q % k == 0 and qkv.shape[1] == q + 2 * k
        turned = rotation[0].shape[-1]
        fits &= rotation[0].shape == rotation[1].shape == (len(qkv), turned) and turned in (0, head_dim / 2)
        fits &= (norm.q.size, norm.k.size) in ((0, 0), (head_dim, head_dim), (q, k))
        fits &= (norm.q_bias.size, norm.k_bias.size) in ((0, 0), (norm.q.size, norm.k.size))
    if not fits:
        shapes = ", ".join(str(a.shape) for a in (*floats, cache))
        raise ValueError(
            "prompt_attention shapes do not fit: qkv, cosines, sines, norms of q and k, their biases, out, cache: "
            f"{shapes}"
        )


def _check_places(tokens: int, cache: np.ndarray, table: np.ndarray, start: int, window: int | None) -> None:
    if table.dtype != np.int32 or table.ndim != 1:
        raise ValueError(f"prompt_attention wants an int32 block table of one axis, got {table.dtype} {table.shape}")
    block_size, end = cache.shape[3], start + tokens
    if not 0 <= start <= end <= table.size * block_size or (window is not None and window < 1):
        raise ValueError(
            f"prompt_attention wants at most {table.size * block_size} positions and a window of at least 1 or None, "
            f"got {start} to {end} and {window}"
        )
    used = table[: -(-end // block_size)]
    if used.size and not 0 <= used.min() <= used.max() < len(cache):
        raise ValueError(f"block ids {used.min()} to {used.max()} leave the cache of {len(cache)} blocks")
