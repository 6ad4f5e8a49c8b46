"""The decode step's attention, for rows of several sequences; see `decode_step.py`."""

from __future__ import annotations

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.addresses import array_at, floats, scales_at
from cpu_kernels.attention import attend_heads
from cpu_kernels.compiled import subroutine
from cpu_kernels.decode_buffers import Column
from cpu_kernels.decode_parts import add_normed, normed, project, row_bytes
from cpu_kernels.gemv import chunk_rows, gemv_rows
from cpu_kernels.inputs import one_input
from cpu_kernels.norm import rms_norm_row
from cpu_kernels.rope import rope_heads
from cpu_kernels.row_dot import prepare


@subroutine
def attention(worker, workers, state, likes, row, rows, shape, eps, rotation, shared, own):  # type: ignore[no-untyped-def]
    """x += attention of norm(x); where the FFN takes the same x, its norm is put aside first."""
    like, d, heads, head_dim = likes[0], shape.d, shape.heads, shape.head_dim
    if shape.parallel:
        normed(likes[1], row[Column.FFN_NORM], row[Column.FFN_NORM_BIAS], shared.x[:rows], shape, eps, own.ahead)
    normed(like, row[Column.ATTENTION_NORM], row[Column.ATTENTION_NORM_BIAS], shared.x[:rows], shape, eps, own.inputs)
    qkv = shared.qkv[:rows]
    project(state, workers, like, row[Column.QKV], row[Column.QKV_BIAS], qkv.shape[1], d, own.inputs, qkv)
    if not barrier.wait(state, workers):
        return False
    sizes = shape.blocks, 2, shape.kv_heads, shape.block_size, head_dim
    cache = array_at(row[Column.KV], sizes, likes[4].dtype)
    scales = scales_at(row[Column.KV_SCALES], sizes[:4], likes[4])
    if not _write_kv(worker, workers, state, row, rows, shape, eps, rotation, cache, scales, shared):
        return False
    each = heads + 2 * shape.kv_heads
    for t in range(rows):
        end, q = shared.positions[t] + 1, shared.qkv_heads[t * each : t * each + heads]
        first = max(0, end - row[Column.WINDOW]) if row[Column.WINDOW] else 0
        out = shared.attended[t * heads : (t + 1) * heads]
        attend_heads(worker, workers, q, cache, scales, shared.tables[t], first, end, shared.scores, out)
    if not barrier.wait(state, workers):
        return False
    width = heads * head_dim
    for t in range(rows):
        v = one_input(own.attended, t)
        for h in range(heads):
            for j in range(head_dim):
                v[0][h * head_dim + j] = shared.attended[t * heads + h, j]
        prepare(like, v, width)
    _add_output(state, workers, like, row, rows, d, width, shared, own)
    if row[Column.ATTENTION_POST_NORM]:
        if not barrier.wait(state, workers):
            return False
        if worker == 0:
            add_normed(row[Column.ATTENTION_POST_NORM], rows, shape, eps, shared)
    return barrier.wait(state, workers)


@subroutine
def _write_kv(worker, workers, state, row, rows, shape, eps, rotation, cache, scales, shared):  # type: ignore[no-untyped-def]
    """Queries and keys normed and rotated, keys and values in their places in the cache. False when aborted."""
    each = shape.head_dim
    if shape.all_heads_normed:
        each = np.int64(0)
        if not _norm_all_heads(worker, workers, state, row, rows, shape, eps, shared):
            return False
    norms = (
        floats(row[Column.Q_NORM], each),
        floats(row[Column.K_NORM], each),
        eps,
        floats(row[Column.Q_NORM_BIAS], each),
        floats(row[Column.K_NORM_BIAS], each),
    )
    heads = shape.heads + 2 * shape.kv_heads
    for t in range(rows):
        position = shared.positions[t]
        at = row[Column.ROTATION] + position
        turn = rotation[0][at], rotation[1][at]
        qkv = shared.qkv_heads[t * heads : (t + 1) * heads]
        rope_heads(worker, workers, qkv, turn, norms, cache, scales, shared.tables[t], position)
    return barrier.wait(state, workers)


@subroutine
def _norm_all_heads(worker, workers, state, row, rows, shape, eps, shared):  # type: ignore[no-untyped-def]
    """RMSNorm of all queries as one, and of all keys; by one worker. False when aborted."""
    q_width, k_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if worker == 0:
        for t in range(rows):
            q, k = shared.qkv[t, :q_width], shared.qkv[t, q_width : q_width + k_width]
            rms_norm_row(q, floats(row[Column.Q_NORM], q_width), eps, q)
            rms_norm_row(k, floats(row[Column.K_NORM], k_width), eps, k)
    return barrier.wait(state, workers)


@subroutine
def _add_output(state, workers, like, row, rows, d, width, shared, own):  # type: ignore[no-untyped-def]
    """x += W_out . attended, by pieces of rows of weights; without x where a norm follows."""
    adds, out = row[Column.ATTENTION_POST_NORM] == 0, shared.projected[:rows]
    bias, size, chunk = floats(row[Column.OUT_BIAS], d), row_bytes(like, width), chunk_rows(d, workers)
    first = barrier.take(state) * chunk
    while first < d:
        last = min(first + chunk, d)
        gemv_rows(like, row[Column.OUT], size, first, last, own.attended, width, bias, out)
        if adds:
            for t in range(rows):
                for j in range(first, last):
                    shared.x[t, j] += out[t, j]
        first = barrier.take(state) * chunk
