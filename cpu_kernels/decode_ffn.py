"""The decode step's FFN by each strategy, over the union of its rows' neurons; see `decode_step.py`."""

from __future__ import annotations

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.activations import activate
from cpu_kernels.addresses import array_at, floats
from cpu_kernels.blocks import padded
from cpu_kernels.certificate import named_rows, put_norms
from cpu_kernels.compiled import subroutine
from cpu_kernels.contract import GROUP, LAYOUTS, MAX_BATCH
from cpu_kernels.decode_buffers import CERTIFIED, DENSE, EXACT, LEARNED, Column, Count, Phase
from cpu_kernels.decode_parts import add_normed, normed, row_bytes, tick
from cpu_kernels.ffn_phases import FFNWeights, down_parts, gate_and_up, merge_parts
from cpu_kernels.gemv import chunk_rows, gemv_rows
from cpu_kernels.inputs import copy, one_input, round_input
from cpu_kernels.low_rank import COUNT_STRIDE, copy_together, firing_rows, hidden_units
from cpu_kernels.proxy import Copies, passing_rows

_INT4_BYTES = LAYOUTS["int4"].row_bytes(GROUP)


@subroutine
def _predicted(worker, workers, state, row, rows, shape, shared, inputs, own, like):  # type: ignore[no-untyped-def]
    """This worker's neurons that the predictor names for some row, in own.ids, and for which, in own.masks; returns
    their number, -1 when aborted."""
    d, f, r = shape.d, shape.f, row[Column.RANK]
    start, stop = r * worker // workers, r * (worker + 1) // workers
    s1, b1 = floats(row[Column.FC1_SCALE], r), floats(row[Column.FC1_BIAS], r)
    units = shared.hidden_units[:rows]
    hidden_units(like, row[Column.FC1], padded(d), start, stop, inputs, d, s1, b1, units)
    if not barrier.wait(state, workers):
        return -1
    for t in range(rows):
        v = one_input(own.units, t)
        copy(units[t], r, v[0])
        round_input(v, r)
    start, stop = f * worker // workers, f * (worker + 1) // workers
    s2, b2 = floats(row[Column.FC2_SCALE], f), floats(row[Column.FC2_BIAS], f)
    threshold = np.int32(row[Column.THRESHOLD]).view(np.float32)
    return firing_rows(
        like, row[Column.FC2], padded(r), start, stop, own.units, rows, r, s2, b2, threshold, own.ids, own.masks
    )


@subroutine
def _uncertain(worker, workers, row, rows, bias, shape, inputs, own, like):  # type: ignore[no-untyped-def]
    """As `_predicted`, the neurons that may fire: all but those that a certificate says cannot."""
    d, f = shape.d, shape.f
    for t in range(rows):
        own.lengths[t] = put_norms(one_input(inputs, t), d)
    start, stop = f * worker // workers, f * (worker + 1) // workers
    slope, rest = floats(row[Column.COPY_SLOPE], f), floats(row[Column.COPY_REST], f)
    threshold = np.int32(shape.activation >> 8).view(np.float32)  # FATReLU's, 0 of others
    return named_rows(
        like, row[Column.COPY], row_bytes(like, d), start, stop, inputs, own.lengths, rows, d, slope, rest, bias,
        threshold, own.ids, own.masks
    )  # fmt: skip


@subroutine
def _passing(worker, workers, row, rows, weights, shape, inputs, own):  # type: ignore[no-untyped-def]
    """As `_predicted`, the neurons whose score by copies in 4 bits passes."""
    d, f = shape.d, shape.f
    like = array_at(0, (1, _INT4_BYTES), np.uint8)
    copies = Copies(
        like, row[Column.COPY], row[Column.COPY_UP], row_bytes(like, d), d, weights.gate_bias, weights.up_bias,
        floats(row[Column.COPY_LENGTHS], f),
    )  # fmt: skip
    start, stop = f * worker // workers, f * (worker + 1) // workers
    threshold = np.int32(row[Column.THRESHOLD]).view(np.float32)
    return passing_rows(copies, start, stop, inputs, rows, shape.activation, threshold, own.ids, own.masks)


@subroutine
def _named(worker, workers, state, row, rows, weights, shape, shared, inputs, own, like):  # type: ignore[no-untyped-def]
    """The neurons that are named for some row, in shared.ids, and of several rows for which, in shared.masks; returns
    their number, -1 when aborted."""
    for t in range(rows):
        round_input(one_input(inputs, t), shape.d)
    if shape.strategy == LEARNED:
        count = _predicted(worker, workers, state, row, rows, shape, shared, inputs, own, like)
    elif shape.strategy == CERTIFIED:
        bias = weights.gate_bias if weights.gate else weights.up_bias
        count = _uncertain(worker, workers, row, rows, bias, shape, inputs, own, like)
    else:
        count = _passing(worker, workers, row, rows, weights, shape, inputs, own)
    if count < 0:
        return np.int64(-1)
    shared.counts[worker * COUNT_STRIDE] = count
    if not barrier.wait(state, workers):
        return np.int64(-1)
    if rows > 1:
        copy_together(worker, workers, shared.counts, own.masks, shared.masks)
    count = copy_together(worker, workers, shared.counts, own.ids, shared.ids)
    return count if barrier.wait(state, workers) else -1


@subroutine
def _first_of_all(state, workers, ffn, rows, shape, shared, inputs):  # type: ignore[no-untyped-def]
    """shared.hidden = the activation of every neuron, by pieces of the rows of weights."""
    f, chunk = shape.f, chunk_rows(shape.f, workers)
    weight, bias = (ffn.gate, ffn.gate_bias) if ffn.gate else (ffn.up, ffn.up_bias)
    hidden = shared.hidden[: rows * f].reshape(rows, f)
    first = barrier.take(state) * chunk
    while first < f:
        last = min(first + chunk, f)
        gemv_rows(ffn.like, weight, ffn.width, first, last, inputs, ffn.d, bias, hidden)
        for t in range(rows):
            for i in range(first, last):
                hidden[t, i] = activate(shape.activation, hidden[t, i])
        first = barrier.take(state) * chunk
    return barrier.wait(state, workers)


@subroutine
def _firing(worker, workers, state, shape, shared, own):  # type: ignore[no-untyped-def]
    """Of one row copy together the neurons whose activation is not 0, ids and values; returns their number, -1 when
    aborted."""
    f, count = shape.f, 0
    for i in range(f * worker // workers, f * (worker + 1) // workers):
        own.ids[count], own.hidden[count] = i, shared.hidden[i]
        count += shared.hidden[i] != 0
    shared.counts[worker * COUNT_STRIDE] = count
    if not barrier.wait(state, workers):
        return -1
    copy_together(worker, workers, shared.counts, own.hidden, shared.hidden)
    count = copy_together(worker, workers, shared.counts, own.ids, shared.ids)
    return count if barrier.wait(state, workers) else -1


@subroutine
def _listed(worker, workers, state, like, row, rows, weights, shape, shared, inputs, own):  # type: ignore[no-untyped-def]
    """The neurons to compute, in shared.ids; returns their number, -1 when aborted. Where none are named first, their
    activations are in shared.hidden."""
    f, begun = shape.f, tick()
    if shape.strategy >= LEARNED:
        n = _named(worker, workers, state, row, rows, weights, shape, shared, inputs, own, like)
        if worker == 0:
            shared.ticks[Phase.PREDICTOR] += tick() - begun
        return n
    if not _first_of_all(state, workers, weights, rows, shape, shared, inputs):
        return np.int64(-1)
    if shape.strategy == EXACT and rows == 1:
        return _firing(worker, workers, state, shape, shared, own)
    for i in range(f * worker // workers, f * (worker + 1) // workers):
        shared.ids[i] = i
    return f if barrier.wait(state, workers) else np.int64(-1)


@subroutine
def _tally(row, n, rows, masks, hidden, shape, shared):  # type: ignore[no-untyped-def]
    """Count what was computed and what fired on each side; by one worker."""
    first_cold, computed = np.int64(0), np.int64(0)
    for k in range(n):
        first_cold += shared.ids[k] < row[Column.HOT]
    if shape.strategy >= LEARNED and rows > 1:
        for t in range(rows):
            for k in range(n):
                computed += (masks[k] >> np.uint32(t)) & np.uint32(1)
    else:
        computed = n * rows
    hot = cold = np.int64(0)
    for t in range(rows):
        for k in range(first_cold):
            hot += hidden[t, k] != 0
        for k in range(first_cold, n):
            cold += hidden[t, k] != 0
    shared.tallies[Count.COMPUTED] += computed
    shared.tallies[Count.UNION] += n
    shared.tallies[Count.FIRED_HOT] += hot
    shared.tallies[Count.FIRED_COLD] += cold


@subroutine
def ffn(worker, workers, state, like, like_codes, row, rows, shape, eps, shared, own):  # type: ignore[no-untyped-def]
    """x += FFN of norm(x), or of own.ahead."""
    d, f, strategy, begun = shape.d, shape.f, shape.strategy, tick()
    inputs, target = own.inputs, shared.x[:rows]
    if shape.parallel:
        inputs = own.ahead
    else:
        normed(like, row[Column.FFN_NORM], row[Column.FFN_NORM_BIAS], shared.x[:rows], shape, eps, inputs)
    if row[Column.FFN_POST_NORM]:
        target = shared.projected[:rows]
    biases = floats(row[Column.GATE_BIAS], f), floats(row[Column.UP_BIAS], f)
    matrices = row[Column.GATE], row[Column.UP], row[Column.DOWN]
    weights = FFNWeights(like, matrices[0], matrices[1], matrices[2], row_bytes(like, d), d, biases[0], biases[1])
    n = _listed(worker, workers, state, like_codes, row, rows, weights, shape, shared, inputs, own)
    if n < 0:
        return False
    if strategy >= LEARNED:
        begun = tick()
    skip, given, masks = strategy != DENSE, strategy < LEARNED, shared.ones
    if strategy >= LEARNED and rows > 1:
        masks = shared.masks
    hidden = shared.hidden[: rows * n].reshape(rows, n)
    gate_and_up(
        state, workers, weights, shared.ids, n, masks, inputs, shape.activation, skip, not given, given, hidden,
        own.places, own.down[1],
    )  # fmt: skip
    if not barrier.wait(state, workers):
        return False
    if worker == workers - 1:
        _tally(row, n, rows, masks, hidden, shape, shared)
    parts = shared.sums.shape[0] // MAX_BATCH
    sums, offsets = shared.sums[: parts * rows], shared.offsets[: parts * rows]
    if worker == 0 and row[Column.FFN_POST_NORM]:
        target[:] = 0
    down_parts(state, workers, weights, shared.ids, n, hidden, skip, parts, own.down, sums, offsets)
    if not barrier.wait(state, workers):
        return False
    merge_parts(worker, workers, like, d, parts, sums, offsets, target)
    if not barrier.wait(state, workers):
        return False
    if worker == 0:
        if row[Column.DOWN_BIAS]:
            bias = floats(row[Column.DOWN_BIAS], d)
            for t in range(rows):
                for j in range(d):
                    target[t, j] += bias[j]
        if row[Column.FFN_POST_NORM]:
            add_normed(row[Column.FFN_POST_NORM], rows, shape, eps, shared)
        shared.ticks[Phase.FFN] += tick() - begun
    return barrier.wait(state, workers) if row[Column.DOWN_BIAS] or row[Column.FFN_POST_NORM] else True
