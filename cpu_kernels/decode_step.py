"""One token through all layers in one compiled call: embedding, attention, FFN, final norm, head.

Threads: every worker of a `WorkerPool` runs `decode_step` at once. Between phases they meet at the pool's barrier,
which polls; nobody waits anywhere else, nothing is allocated, and no Python runs. A phase reads what the one before it
wrote to the shared buffers. Within a phase workers take pieces of rows until none is left, as some are faster, or have
heads or columns of their own; a result is one worker's and does not depend on whose, so that the answer is the same,
bit for bit, for any number of workers. Norms are computed by every worker for itself: 0.6 us at d=4096, less than a
wait.

Weights are addresses in a table, one row a layer (`Column`), so that a call unpacks no arrays per layer, and
memory-mapped weights serve as they are. `likes` are empty arrays whose types say how each kind of matrix is stored.

Phases of a layer, each ended by a barrier: QKV; RoPE and KV write; attention; output and residual; then
    dense     gate of all; up of all; down; merge
    exact     gate of all; the firing copied together; their up; down; merge
    learned   predictor's hidden units; its rows, copied together; their gate and up; down; merge
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels import barrier
from cpu_kernels.activations import activate
from cpu_kernels.addresses import array_at, floats
from cpu_kernels.attention import attend_heads
from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import GROUP
from cpu_kernels.decode_buffers import (
    DENSE,
    EXACT,
    LEARNED,
    Column,
    Count,
    Ends,
    Number,
    Phase,
    read_own,
    read_shared,
    shape_of,
)
from cpu_kernels.ffn_phases import FFNWeights, down_parts, gate_and_up, merge_parts
from cpu_kernels.gemv import chunk_rows, gemv_rows, gemv_shared
from cpu_kernels.lanes import copy, one_input, round_input
from cpu_kernels.low_rank import COUNT_STRIDE, copy_together, firing_rows, hidden_units
from cpu_kernels.norm import layer_norm_row, rms_norm_row
from cpu_kernels.rope import rope_heads
from cpu_kernels.row_dot import prepare
from cpu_kernels.row_sum import finish, sum_rows
from cpu_kernels.row_types import group_bytes, row_group


@intrinsic
def _tick(typing_context: Any) -> Any:
    """The processor's running count of ticks."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@subroutine
def row_bytes(like, columns):  # type: ignore[no-untyped-def]
    """Bytes of a row."""
    group = row_group(like)
    return (columns + group - 1) // group * group_bytes(like)


@subroutine
def _normed(like, weight, bias, shape, eps, shared, inputs):  # type: ignore[no-untyped-def]
    """inputs = norm(x), in the form that rows like `like` are multiplied with; weight, bias: addresses of f32, weight 0
    where x is taken as it is."""
    d, v = shape.d, one_input(inputs, 0)
    if weight == 0:
        copy(shared.x[0], d, v[0])
    elif shape.layer_norm:
        layer_norm_row(shared.x[0], floats(weight, d), floats(bias, d), eps, v[0])
    else:
        rms_norm_row(shared.x[0], floats(weight, d), eps, v[0])
    prepare(like, v, d)


@subroutine
def _add_normed(norm, shape, eps, shared):  # type: ignore[no-untyped-def]
    """x += RMSNorm of shared.projected, with weights at the address `norm`; by one worker."""
    rms_norm_row(shared.projected[0], floats(norm, shape.d), eps, shared.projected[0])
    for j in range(shape.d):
        shared.x[0, j] += shared.projected[0, j]


@subroutine
def _add_embedding(like, table, row, scale, shape, shared, own):  # type: ignore[no-untyped-def]
    """x += scale times one row of an embedding matrix."""
    d, first, one = shape.d, np.int64(0), np.int64(1)
    _, picked, scales, steps = own.down
    picked[0], scales[0, 0] = row, scale
    sums, offsets = shared.sums[:1], shared.offsets[:1]
    none = table, table, table, table
    padded = sums.shape[1]
    sum_rows(
        like, table, row_bytes(like, d), picked, scales, first, one, none, d, first, padded, sums, offsets, steps
    )  # fmt: skip
    finish(like, sums[0], offsets[0], d, first, padded, shared.x[0])


@subroutine
def _project(state, workers, like, weight, bias, n, columns, inputs, out):  # type: ignore[no-untyped-def]
    """out = W . input, which is in form; workers take pieces of the rows."""
    gemv_shared(state, workers, like, weight, row_bytes(like, columns), n, inputs, columns, floats(bias, n), out)


@subroutine
def attention(  # type: ignore[no-untyped-def]
    worker, workers, state, like, ffn_like, kv_like, row, shape, eps, rotation, blocks, position, shared, own
):  # fmt: skip
    """x += attention of norm(x); where the FFN takes the same x, its norm is put aside first."""
    d, heads, head_dim = shape.d, shape.heads, shape.head_dim
    if shape.parallel:
        _normed(ffn_like, row[Column.FFN_NORM], row[Column.FFN_NORM_BIAS], shape, eps, shared, own.ahead)
    _normed(like, row[Column.ATTENTION_NORM], row[Column.ATTENTION_NORM_BIAS], shape, eps, shared, own.inputs)
    width = heads * head_dim
    _project(
        state, workers, like, row[Column.QKV], row[Column.QKV_BIAS], shared.qkv.shape[1], d, own.inputs, shared.qkv
    )
    if not barrier.wait(state, workers):
        return False
    sizes = shape.blocks, 2, shape.kv_heads, shape.block_size, head_dim
    cache = array_at(row[Column.KV], sizes, kv_like.dtype)
    each = head_dim
    if shape.all_heads_normed:
        each = np.int64(0)
        if not _norm_all_heads(worker, workers, state, row, width, shape.kv_heads * head_dim, eps, shared):
            return False
    norms = (
        floats(row[Column.Q_NORM], each),
        floats(row[Column.K_NORM], each),
        eps,
        floats(row[Column.Q_NORM_BIAS], each),
        floats(row[Column.K_NORM_BIAS], each),
    )
    at = row[Column.ROTATION] + position
    turn = rotation[0][at], rotation[1][at]
    rope_heads(worker, workers, shared.qkv_heads, turn, norms, cache, blocks, position)
    if not barrier.wait(state, workers):
        return False
    first = max(0, position + 1 - row[Column.WINDOW]) if row[Column.WINDOW] else 0
    q = shared.qkv_heads[:heads]
    attend_heads(worker, workers, q, cache, blocks, first, position + 1, shared.scores, shared.attended)
    if not barrier.wait(state, workers):
        return False
    v = one_input(own.attended, 0)
    for h in range(heads):
        for j in range(head_dim):
            v[0][h * head_dim + j] = shared.attended[h, j]
    prepare(like, v, width)
    _add_output(state, workers, like, row, d, width, shared, own)
    if row[Column.ATTENTION_POST_NORM]:
        if not barrier.wait(state, workers):
            return False
        if worker == 0:
            _add_normed(row[Column.ATTENTION_POST_NORM], shape, eps, shared)
    return barrier.wait(state, workers)


@subroutine
def _norm_all_heads(worker, workers, state, row, q_width, k_width, eps, shared):  # type: ignore[no-untyped-def]
    """RMSNorm of all queries as one, and of all keys; by one worker. False when aborted."""
    if worker == 0:
        q, k = shared.qkv[0, :q_width], shared.qkv[0, q_width : q_width + k_width]
        rms_norm_row(q, floats(row[Column.Q_NORM], q_width), eps, q)
        rms_norm_row(k, floats(row[Column.K_NORM], k_width), eps, k)
    return barrier.wait(state, workers)


@subroutine
def _add_output(state, workers, like, row, d, width, shared, own):  # type: ignore[no-untyped-def]
    """x += W_out . attended, by pieces of rows; without x where a norm follows."""
    adds = row[Column.ATTENTION_POST_NORM] == 0
    bias, size, chunk = floats(row[Column.OUT_BIAS], d), row_bytes(like, width), chunk_rows(d, workers)
    first = barrier.take(state) * chunk
    while first < d:
        last = min(first + chunk, d)
        gemv_rows(like, row[Column.OUT], size, first, last, own.attended, width, bias, shared.projected)
        if adds:
            for j in range(first, last):
                shared.x[0, j] += shared.projected[0, j]
        first = barrier.take(state) * chunk


@subroutine
def _predict(worker, workers, state, row, shape, shared, inputs, own, like):  # type: ignore[no-untyped-def]
    """The ids of the neurons that the predictor names, in shared.ids; returns their number, -1 when aborted."""
    d, f, r = shape.d, shape.f, row[Column.RANK]
    v = one_input(inputs, 0)
    round_input(v, d)
    start, stop = r * worker // workers, r * (worker + 1) // workers
    s1, b1 = floats(row[Column.FC1_SCALE], r), floats(row[Column.FC1_BIAS], r)
    hidden_units(like, row[Column.FC1], padded(d), start, stop, v, d, s1, b1, shared.hidden_units)
    if not barrier.wait(state, workers):
        return -1
    v = one_input(own.units, 0)
    copy(shared.hidden_units, r, v[0])
    round_input(v, r)
    start, stop = f * worker // workers, f * (worker + 1) // workers
    s2, b2 = floats(row[Column.FC2_SCALE], f), floats(row[Column.FC2_BIAS], f)
    threshold = np.int32(row[Column.THRESHOLD]).view(np.float32)
    shared.counts[worker * COUNT_STRIDE] = firing_rows(
        like, row[Column.FC2], padded(r), start, stop, v, r, s2, b2, threshold, own.ids
    )
    if not barrier.wait(state, workers):
        return -1
    count = copy_together(worker, workers, shared.counts, own.ids, shared.ids)
    return count if barrier.wait(state, workers) else -1


@subroutine
def _first_of_all(state, workers, ffn, shape, shared, inputs):  # type: ignore[no-untyped-def]
    """shared.hidden = the activation of every neuron, by pieces of the rows."""
    f, chunk = shape.f, chunk_rows(shape.f, workers)
    weight, bias = (ffn.gate, ffn.gate_bias) if ffn.gate else (ffn.up, ffn.up_bias)
    first = barrier.take(state) * chunk
    while first < f:
        last = min(first + chunk, f)
        gemv_rows(ffn.like, weight, ffn.width, first, last, inputs, ffn.d, bias, shared.hidden)
        for i in range(first, last):
            shared.hidden[0, i] = activate(shape.activation, shared.hidden[0, i])
        first = barrier.take(state) * chunk
    return barrier.wait(state, workers)


@subroutine
def _firing(worker, workers, state, shape, shared, own):  # type: ignore[no-untyped-def]
    """Copy together the neurons whose activation is not 0, ids and values; returns their number, -1 when aborted."""
    f, count = shape.f, 0
    for i in range(f * worker // workers, f * (worker + 1) // workers):
        own.ids[count], own.hidden[count] = i, shared.hidden[0, i]
        count += shared.hidden[0, i] != 0
    shared.counts[worker * COUNT_STRIDE] = count
    if not barrier.wait(state, workers):
        return -1
    copy_together(worker, workers, shared.counts, own.hidden, shared.hidden[0])
    count = copy_together(worker, workers, shared.counts, own.ids, shared.ids)
    return count if barrier.wait(state, workers) else -1


@subroutine
def _tally(row, n, shape, shared):  # type: ignore[no-untyped-def]
    """Count what was computed and what fired on each side; by one worker."""
    hot = cold = 0
    for k in range(n):
        fired = shared.hidden[0, k] != 0
        is_hot = shared.ids[k] < row[Column.HOT]
        hot += fired and is_hot
        cold += fired and not is_hot
    shared.tallies[Count.COMPUTED] += n
    shared.tallies[Count.FIRED_HOT] += hot
    shared.tallies[Count.FIRED_COLD] += cold


@subroutine
def ffn(worker, workers, state, like, like_codes, row, shape, eps, shared, own):  # type: ignore[no-untyped-def]
    """x += FFN of norm(x), or of own.ahead."""
    d, f, strategy = shape.d, shape.f, shape.strategy
    begun = _tick()
    inputs, target = own.inputs, shared.x
    if shape.parallel:
        inputs = own.ahead
    else:
        _normed(like, row[Column.FFN_NORM], row[Column.FFN_NORM_BIAS], shape, eps, shared, inputs)
    if row[Column.FFN_POST_NORM]:
        target = shared.projected
    biases = floats(row[Column.GATE_BIAS], f), floats(row[Column.UP_BIAS], f)
    matrices = row[Column.GATE], row[Column.UP], row[Column.DOWN]
    weights = FFNWeights(like, matrices[0], matrices[1], matrices[2], row_bytes(like, d), d, biases[0], biases[1])
    n, skip = f, strategy != DENSE
    if strategy == LEARNED:
        n = _predict(worker, workers, state, row, shape, shared, inputs, own, like_codes)
        if worker == 0:
            now = _tick()
            shared.ticks[Phase.PREDICTOR] += now - begun
            begun = now
    elif not _first_of_all(state, workers, weights, shape, shared, inputs):
        n = -1
    elif strategy == EXACT:
        n = _firing(worker, workers, state, shape, shared, own)
    else:
        for i in range(f * worker // workers, f * (worker + 1) // workers):
            shared.ids[i] = i
        n = f if barrier.wait(state, workers) else -1
    if n < 0:
        return False
    gate_and_up(
        state, workers, weights, shared.ids, n, shared.ones, inputs, shape.activation, skip, strategy == LEARNED,
        strategy != LEARNED, shared.hidden, own.places, own.down[1],
    )  # fmt: skip
    if not barrier.wait(state, workers):
        return False
    if worker == workers - 1:
        _tally(row, n, shape, shared)
    most = shared.sums.shape[0]
    if worker == 0 and row[Column.FFN_POST_NORM]:
        shared.projected[:] = 0
    _, parts = down_parts(
        state, workers, weights, shared.ids, n, shared.hidden, skip, most, own.down, shared.sums, shared.offsets
    )
    if not barrier.wait(state, workers):
        return False
    merge_parts(worker, workers, like, d, parts, shared.sums, shared.offsets, target)
    if not barrier.wait(state, workers):
        return False
    if worker == 0:
        if row[Column.DOWN_BIAS]:
            bias = floats(row[Column.DOWN_BIAS], d)
            for j in range(d):
                target[0, j] += bias[j]
        if row[Column.FFN_POST_NORM]:
            _add_normed(row[Column.FFN_POST_NORM], shape, eps, shared)
        shared.ticks[Phase.FFN] += _tick() - begun
    return barrier.wait(state, workers) if row[Column.DOWN_BIAS] or row[Column.FFN_POST_NORM] else True


@subroutine
def head(worker, workers, state, like, ends, shape, eps, shared, own):  # type: ignore[no-untyped-def]
    """shared.logits of shared.x. False when aborted."""
    d, begun = shape.d, _tick()
    _normed(like, ends[Ends.FINAL_NORM], ends[Ends.FINAL_NORM_BIAS], shape, eps, shared, own.inputs)
    _project(state, workers, like, ends[Ends.HEAD], np.int64(0), shape.vocab, d, own.inputs, shared.logits)
    if not barrier.wait(state, workers):
        return False
    if worker == 0:
        shared.ticks[Phase.HEAD] += _tick() - begun
    return True


@kernel
def decode_step(worker, workers, state, likes, table, numbers, shared_table, own_table):  # type: ignore[no-untyped-def]
    """shared.logits [1, vocab] of the token after the given one, whose keys and values go to its place in the KV cache.

    state: the pool's barrier. likes: types of attention, FFN, head, embedding, and of keys and values. table: int64
    [layers + 1, 32]. numbers: int64, the `Shape` and what `Number` names. shared_table, own_table: of what
    `read_shared` and `read_own` make; rotation: cosines and sines f32 [n, head_dim / 2], `capacity` rows for each
    RoPE of the model, or [capacity, 0];
    blocks: the cache's block table.
    """
    like, ffn_like, head_like, embedding_like, kv_like = likes
    codes_like = array_at(0, (1, GROUP), np.int8)
    rotation, blocks, shared = read_shared(shared_table)
    own, shape = read_own(own_table), shape_of(numbers)
    eps, position = np.int64(numbers[Number.EPS]).view(np.float64), numbers[Number.POSITION]
    scale = np.float32(np.int64(numbers[Number.SCALE]).view(np.float64))
    layers = table.shape[0] - 1
    ends = table[layers]
    if worker == 0:
        shared.x[:] = 0
        _add_embedding(embedding_like, ends[Ends.EMBEDDING], numbers[Number.TOKEN], scale, shape, shared, own)
        if ends[Ends.POSITIONS]:
            _add_embedding(embedding_like, ends[Ends.POSITIONS], position + 2, np.float32(1), shape, shared, own)
        if ends[Ends.EMBEDDING_NORM]:
            rms_norm_row(shared.x[0], floats(ends[Ends.EMBEDDING_NORM], shape.d), eps, shared.x[0])
    if not barrier.wait(state, workers):
        return
    for layer in range(layers):
        begun, row = _tick(), table[layer]
        if not attention(
            worker, workers, state, like, ffn_like, kv_like, row, shape, eps, rotation, blocks, position, shared, own
        ):
            return
        if worker == 0:
            shared.ticks[Phase.ATTENTION] += _tick() - begun
        if not ffn(worker, workers, state, ffn_like, codes_like, row, shape, eps, shared, own):
            return
    head(worker, workers, state, head_like, ends, shape, eps, shared, own)
