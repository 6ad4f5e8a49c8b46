"""Rows of tokens through all layers in one compiled call: embedding, attention, FFN, final norm, head.

A row is a token of some sequence at some position: one for an answer, several for several answers or a short piece of
a prompt, whose later rows see the earlier. Weights are read once for all rows; what a row gets of them has the same
bits alone and among others.

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
    exact     gate of all; of one row the firing copied together; up of what fires; down; merge
    learned   predictor's hidden units; its rows, copied together; their gate and up; down; merge
    certified copies of gate; rows that may fire, copied together; their gate and up; down; merge
    proxy     copies of gate and up; rows whose score passes, copied together; their gate and up; down; merge
"""

from __future__ import annotations

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.addresses import array_at, floats
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import GROUP
from cpu_kernels.decode_attention import attention
from cpu_kernels.decode_buffers import Ends, Number, Phase, read_own, read_shared, shape_of
from cpu_kernels.decode_ffn import ffn
from cpu_kernels.decode_parts import normed, project, row_bytes, tick
from cpu_kernels.norm import rms_norm_row
from cpu_kernels.row_sum import finish, sum_rows


@subroutine
def _add_embedding(like, table, row, scale, x, shape, shared, own):  # type: ignore[no-untyped-def]
    """x += scale times one row of an embedding matrix."""
    d, first, one = shape.d, np.int64(0), np.int64(1)
    _, picked, scales, steps = own.down
    picked[0], scales[0] = row, scale
    sums, offsets = shared.sums[0], shared.offsets[0]
    sums[:] = 0
    offsets[:] = 0
    none = table, table, table, table
    padded = sums.shape[0]
    sum_rows(
        like, table, row_bytes(like, d), picked, scales, first, one, none, d, first, padded, sums, offsets, steps
    )  # fmt: skip
    finish(like, sums, offsets, d, first, padded, x)


@subroutine
def _embed(like, ends, scale, rows, shape, eps, shared, own):  # type: ignore[no-untyped-def]
    """x = what the first layer takes of each row's token and position; by one worker."""
    for t in range(rows):
        x = shared.x[t]
        x[:] = 0
        _add_embedding(like, ends[Ends.EMBEDDING], shared.tokens[t], scale, x, shape, shared, own)
        if ends[Ends.POSITIONS]:
            at = shared.positions[t] + 2
            _add_embedding(like, ends[Ends.POSITIONS], at, np.float32(1), x, shape, shared, own)
        if ends[Ends.EMBEDDING_NORM]:
            rms_norm_row(x, floats(ends[Ends.EMBEDDING_NORM], shape.d), eps, x)


@subroutine
def head(worker, workers, state, like, ends, first, rows, shape, eps, shared, own):  # type: ignore[no-untyped-def]
    """shared.logits of shared.x, of the rows from `first` on. False when aborted."""
    d, begun, x, logits = shape.d, tick(), shared.x[first:rows], shared.logits[: rows - first]
    normed(like, ends[Ends.FINAL_NORM], ends[Ends.FINAL_NORM_BIAS], x, shape, eps, own.inputs)
    project(state, workers, like, ends[Ends.HEAD], np.int64(0), shape.vocab, d, own.inputs, logits)
    if not barrier.wait(state, workers):
        return False
    if worker == 0:
        shared.ticks[Phase.HEAD] += tick() - begun
    return True


@kernel
def decode_step(worker, workers, state, likes, table, numbers, shared_table, own_table):  # type: ignore[no-untyped-def]
    """shared.logits [rows - first, vocab] after the tokens of the rows from `first` on. Every row's keys and values go
    to their place in the KV cache.

    state: the pool's barrier. likes: types of attention, FFN, head, embedding, and of keys and values. table: int64
    [layers + 1, 38]. numbers: int64, the `Shape` and what `Number` names. shared_table, own_table: of what
    `read_shared` and `read_own` make; rotation: cosines and sines f32 [n, head_dim / 2], `capacity` rows for each
    RoPE of the model, or [capacity, 0]. The rows' tokens, positions and block tables are in the shared buffers.
    """
    rotation, shared = read_shared(shared_table)
    own, shape, rows = read_own(own_table), shape_of(numbers), numbers[Number.ROWS]
    codes_like = array_at(0, (1, GROUP), np.int8)
    eps = np.int64(numbers[Number.EPS]).view(np.float64)
    scale = np.float32(np.int64(numbers[Number.SCALE]).view(np.float64))
    layers = table.shape[0] - 1
    ends = table[layers]
    if worker == 0:
        _embed(likes[3], ends, scale, rows, shape, eps, shared, own)
    if not barrier.wait(state, workers):
        return
    for layer in range(layers):
        begun, row = tick(), table[layer]
        if not attention(worker, workers, state, likes, row, rows, shape, eps, rotation, shared, own):
            return
        if worker == 0:
            shared.ticks[Phase.ATTENTION] += tick() - begun
        if not ffn(worker, workers, state, likes[1], codes_like, row, rows, shape, eps, shared, own):
            return
    head(worker, workers, state, likes[2], ends, numbers[Number.FIRST], rows, shape, eps, shared, own)
