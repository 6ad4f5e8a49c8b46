"""The phases of a sparse FFN as compiled code, between whose calls workers meet at a barrier: see `sparse_ffn.py`.

A row of down belongs to a part by its neuron's number alone, and a part is summed row after row: what other tokens add
to the union of rows are zeros to this one. So a token's sum has the same bits alone and in any company.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.activations import activate, activate_up
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import BLOCK
from cpu_kernels.inputs import one_input
from cpu_kernels.lanes import fetch
from cpu_kernels.row_dot import dot_four
from cpu_kernels.row_sum import column_bytes, finish, four_rows, new_steps, sum_rows
from cpu_kernels.row_types import columns_unit

LAST_ROWS = 4  # of gate and up, for each worker, that are taken one by one
MAX_PARTS = 8  # in which the rows of down are summed, a power of two
# Neighbours that go to one part: hot neurons, which lie first, are shared out evenly, and are still read side by side.
_RUN_BITS = 4
_MOST_SHARED = 128  # rows that several tokens go through one after another, so that they are in L2 from the second on


class FFNWeights(NamedTuple):
    """One layer's neurons in compiled code: the type of a row, addresses of the matrices (gate 0 for none), bytes of a
    row, its columns, biases f32 [f] (of length 0 for none)."""

    like: np.ndarray
    gate: int
    up: int
    down: int
    width: int
    d: int
    gate_bias: np.ndarray
    up_bias: np.ndarray


# What a worker needs alone for `down_parts`: each part's first place and the place after its last int64; picked int32
# and scales f32 of those places, of which each part has one to spare, then of a token's own among some rows; steps.
DownScratch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def new_down_scratch(d: int, f: int) -> DownScratch:
    """One worker's scratch."""
    places = f + MAX_PARTS + _MOST_SHARED
    return np.zeros(2 * MAX_PARTS, np.int64), np.zeros(places, np.int32), np.zeros(places, np.float32), new_steps(d)


@subroutine(forceinline=True)
def _rows_of_piece(piece, n, workers):  # type: ignore[no-untyped-def]
    """Rows [start, stop) of a piece of work: four, but one by one at the end, so that all workers end together."""
    fours = max(0, n - LAST_ROWS * workers) // 4
    if piece < fours:
        return 4 * piece, 4 * piece + 4
    start = 3 * fours + piece
    return start, start + 1


@subroutine
def gate_and_up(  # type: ignore[no-untyped-def]
    state, workers, ffn, ids, n, masks, inputs, word, skip, likely, given, hidden, places, picked
):  # fmt: skip
    """hidden[t, k] = act(gate . x) * up . x (of dReLU * relu(up . x)) of row ids[k] < n where it is token t's, 0 where
    not; for the pieces of k that this worker takes. With `skip`, rows whose activation is 0 end there.

    masks: bit t where a row is token t's, of one token not looked at. likely: whether most of these rows fire, so that
    their rows of up are fetched with those of gate: of predicted ones most do, of all neurons few. given: hidden has
    the activations already. places, picked: this worker's own scratch, int32 [f].
    """
    if hidden.shape[0] > 1:
        _of_several(state, workers, ffn, ids, n, masks, inputs, word, skip, given, hidden, places, picked)
        return
    count, v = np.int64(0), one_input(inputs, 0)  # a literal 0 would have every callee compiled for itself
    start, stop = _rows_of_piece(barrier.take(state), n, workers)
    while start < n:
        following = _rows_of_piece(barrier.take(state), n, workers)
        if not given:
            _first_rows(ffn, ids, start, stop, following[0], n, likely, v, word, hidden[0])
        live = stop - start
        if skip:
            live = 0
            for k in range(start, stop):
                places[count + live], picked[count + live] = k, ids[k]
                live += hidden[0, k] != 0
        if ffn.gate:
            if live == stop - start:
                ahead = four_rows(ffn.gate, ffn.width, ids, min(following[0], n - 1), n)
                _up_rows(ffn, ids, start, stop, ahead, v, word, hidden[0])
            else:
                count += live
        start, stop = following
    if ffn.gate:
        _second_rows(ffn, count, v, word, hidden[0], places, picked)


@subroutine
def _of_several(  # type: ignore[no-untyped-def]
    state, workers, ffn, ids, n, masks, inputs, word, skip, given, hidden, places, picked
):  # fmt: skip
    """`gate_and_up` of several tokens: of each piece of the rows, one token's own after another's."""
    size = max(4, min(_MOST_SHARED, n // (8 * workers) & -4))
    start = barrier.take(state) * size
    while start < n:
        stop = min(start + size, n)
        for t in range(hidden.shape[0]):
            own, v, count = hidden[t], one_input(inputs, t), np.int64(0)
            for k in range(start, stop):
                places[count], picked[count] = k, ids[k]
                if given:
                    count += not skip or own[k] != 0
                else:
                    count += (masks[k] >> np.uint32(t)) & np.uint32(1)
                    own[k] = 0
            if not given:
                count = _activations(ffn, count, v, word, skip, own, places, picked)
            if ffn.gate:
                _second_rows(ffn, count, v, word, own, places, picked)
        start = barrier.take(state) * size


@subroutine
def _activations(ffn, count, v, word, skip, hidden, places, picked):  # type: ignore[no-untyped-def]
    """hidden[places[i]] = the activation of row picked[i] for i < count, of which those stay listed that fire, or all
    without `skip`; returns their number."""
    weight, bias = (ffn.gate, ffn.gate_bias) if ffn.gate else (ffn.up, ffn.up_bias)
    coming = ffn.up if ffn.gate else weight
    live = np.int64(0)
    for k in range(0, count, 4):
        rows, ahead = four_rows(weight, ffn.width, picked, k, count), four_rows(coming, ffn.width, picked, k, count)
        sums = dot_four(ffn.like, rows, ahead, v, ffn.d)
        for i in range(min(4, count - k)):
            z, place, neuron = sums[i], places[k + i], picked[k + i]
            if bias.shape[0]:
                z += bias[neuron]
            hidden[place] = activate(word, z)
            places[live], picked[live] = place, neuron
            live += not skip or hidden[place] != 0
    return live


@subroutine(forceinline=True)
def _first_rows(ffn, ids, start, stop, following, n, likely, v, word, hidden):  # type: ignore[no-untyped-def]
    """The activations of rows ids[start:stop], at most four, while those that come next are fetched: their up, where
    there is one and they are likely to fire, or else first rows from ids[following] on."""
    weight, bias = (ffn.gate, ffn.gate_bias) if ffn.gate else (ffn.up, ffn.up_bias)
    rows = four_rows(weight, ffn.width, ids, start, stop)
    if ffn.gate and likely:
        ahead = four_rows(ffn.up, ffn.width, ids, start, stop)
    else:
        ahead = four_rows(weight, ffn.width, ids, min(following, n - 1), n)
    sums = dot_four(ffn.like, rows, ahead, v, ffn.d)
    for i in range(stop - start):
        z = sums[i]
        if bias.shape[0]:
            z += bias[ids[start + i]]
        hidden[start + i] = activate(word, z)


@subroutine(forceinline=True)
def _up_rows(ffn, ids, start, stop, ahead, v, word, hidden):  # type: ignore[no-untyped-def]
    """hidden[start:stop] *= what up . x gives of rows ids[start:stop], at most four."""
    rows = four_rows(ffn.up, ffn.width, ids, start, stop)
    sums = dot_four(ffn.like, rows, ahead, v, ffn.d)
    for i in range(stop - start):
        u = sums[i]
        if ffn.up_bias.shape[0]:
            u += ffn.up_bias[ids[start + i]]
        hidden[start + i] *= activate_up(word, u)


@subroutine(forceinline=True)
def _second_rows(ffn, count, v, word, hidden, places, picked):  # type: ignore[no-untyped-def]
    """hidden[places[i]] *= what up . x gives of row picked[i], for i < count."""
    for k in range(0, count, 4):
        rows = four_rows(ffn.up, ffn.width, picked, k, count)
        ahead = four_rows(ffn.up, ffn.width, picked, k + 4, count)
        sums = dot_four(ffn.like, rows, ahead, v, ffn.d)
        for i in range(min(4, count - k)):
            u = sums[i]
            if ffn.up_bias.shape[0]:
                u += ffn.up_bias[picked[k + i]]
            hidden[places[k + i]] *= activate_up(word, u)


@kernel
def sum_parts(f):  # type: ignore[no-untyped-def]
    """Parts in which the rows of down are summed: of the model alone, so that no answer depends on the workers."""
    parts = 1
    while 2 * parts <= min(MAX_PARTS, f // 1024):
        parts *= 2
    return parts


@subroutine(forceinline=True)
def _part_of(neuron, parts):  # type: ignore[no-untyped-def]
    return (neuron >> _RUN_BITS) & (parts - 1)


@subroutine
def _sort_by_part(ids, n, hidden, skip, parts, ends, picked, scales):  # type: ignore[no-untyped-def]
    """Rows part after part, each part's first place to ends[:parts] and the place after its last to ends[MAX_PARTS:].

    Of one token those that are not skipped, ids to `picked` and their hidden to `scales`; without branches, which would
    often be foreseen wrongly: a row that is skipped is overwritten by the next. Of several tokens all, their k to
    `picked`.
    """
    several = hidden.shape[0] > 1
    skip = skip and not several
    for part in range(parts):
        ends[MAX_PARTS + part] = 0
    for k in range(n):
        ends[MAX_PARTS + _part_of(ids[k], parts)] += not skip or hidden[0, k] != 0
    first = np.int64(0)
    for part in range(parts):
        count = ends[MAX_PARTS + part]
        ends[part], ends[MAX_PARTS + part] = first, first
        first += count + 1
    for k in range(n):
        part = _part_of(ids[k], parts)
        place, value = ends[MAX_PARTS + part], hidden[0, k]
        picked[place], scales[place] = k if several else ids[k], value
        ends[MAX_PARTS + part] = place + (not skip or value != 0)


@subroutine(forceinline=True)
def _piece_of_down(piece, parts, slices):  # type: ignore[no-untyped-def]
    """A piece's part of the rows, its slice of the columns, and of how many such slices; the last quarter of the parts
    is cut into smaller ones, so that all workers end together."""
    whole = parts - parts // 4
    if piece < whole * slices:
        return piece // slices, piece % slices, slices
    rest = piece - whole * slices
    return whole + rest // (2 * slices), rest % (2 * slices), 2 * slices


@subroutine
def down_parts(state, workers, ffn, ids, n, hidden, skip, parts, own, sums, offsets):  # type: ignore[no-untyped-def]
    """Sum hidden . down over the pieces that this worker takes.

    parts: of `sum_parts`. A piece is one part of the rows and a slice of the columns, of which there are enough to give
    every worker some. own: this worker's `DownScratch`. sums, offsets: a result of `sum_rows` for each part and token,
    [parts * t, ...].
    """
    ends, picked, scales, steps = own
    tokens, like = hidden.shape[0], ffn.like
    _sort_by_part(ids, n, hidden, skip, parts, ends, picked, scales)
    unit = columns_unit(like)
    units = (ffn.d + unit - 1) // unit
    slices = max(1, min((2 * workers + parts - 1) // parts, units // 4))
    pieces = (parts + parts // 4) * slices
    piece = barrier.take(state)
    while piece < pieces:
        after = barrier.take(state)
        part, column, of = _piece_of_down(piece, parts, slices)
        first, last = unit * (units * column // of), unit * (units * (column + 1) // of)
        start, stop = ends[part], ends[MAX_PARTS + part]
        for row in range(part * tokens, (part + 1) * tokens):
            sums[row, first:last] = 0
            offsets[row, first // BLOCK : last // BLOCK] = 0
        if tokens == 1:
            other, next_column, next_of = _piece_of_down(min(after, pieces - 1), parts, slices)
            # The next piece's rows, as far ahead of their columns as this piece's columns are.
            shift = column_bytes(like, unit * (units * next_column // next_of)) - column_bytes(like, first)
            begin = ends[other]
            ahead = four_rows(ffn.down + shift, ffn.width, picked, begin, max(begin + 1, ends[MAX_PARTS + other]))
            sum_rows(
                like, ffn.down, ffn.width, picked, scales, start, stop, ahead, ffn.d, first, last, sums[part],
                offsets[part], steps,
            )  # fmt: skip
        else:
            rows = slice(part * tokens, (part + 1) * tokens)
            _down_of_several(ffn, ids, hidden, own, start, stop, first, last, sums[rows], offsets[rows])
        piece = after


@subroutine
def _down_of_several(ffn, ids, hidden, own, start, stop, first, last, sums, offsets):  # type: ignore[no-untyped-def]
    """`sum_rows` of each token's own rows among those of a part, some of the part's rows at a time."""
    _, picked, scales, steps = own
    like, zero, most = ffn.like, np.int64(0), np.int64(_MOST_SHARED)
    mine, factors = picked[picked.shape[0] - most :], scales[scales.shape[0] - most :]
    for begin in range(start, stop, most):
        for t in range(hidden.shape[0]):
            count = np.int64(0)
            for place in range(begin, min(begin + most, stop)):
                value = hidden[t, picked[place]]
                mine[count], factors[count] = ids[picked[place]], value
                count += value != 0
            none = four_rows(ffn.down, ffn.width, mine, zero, max(count, 1))
            sum_rows(
                like, ffn.down, ffn.width, mine, factors, zero, count, none, ffn.d, first, last, sums[t], offsets[t],
                steps,
            )  # fmt: skip


@kernel
def count_fired(hidden, n):  # type: ignore[no-untyped-def]
    """How many values of hidden[:, :n] are not 0."""
    fired = np.int64(0)
    for t in range(hidden.shape[0]):
        for k in range(n):
            fired += hidden[t, k] != 0
    return fired


@subroutine
def merge_parts(worker, workers, like, d, parts, sums, offsets, out):  # type: ignore[no-untyped-def]
    """out[t] += the parts' sums, in order, of this worker's columns."""
    tokens = out.shape[0]
    unit = columns_unit(like)
    units = (d + unit - 1) // unit
    first, last = unit * (units * worker // workers), unit * (units * (worker + 1) // workers)
    for row in range(parts * tokens):  # they lie in other workers' caches: all at once, not one part after another
        for j in range(first, last, 16):
            fetch(sums[row], j)
    for t in range(tokens):
        for part in range(1, parts):
            row = part * tokens + t
            for j in range(first, last):
                sums[t, j] += sums[row, j]
            for b in range(first // BLOCK, last // BLOCK):
                offsets[t, b] += offsets[row, b]
        finish(like, sums[t], offsets[t], d, first, last, out[t])
