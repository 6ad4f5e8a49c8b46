"""The phases of a sparse FFN as compiled code, between whose calls workers meet at a barrier: see `sparse_ffn.py`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.activations import activate
from cpu_kernels.blocks import BLOCK
from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import one_input
from cpu_kernels.row_dot import dot_four
from cpu_kernels.row_sum import column_bytes, columns_unit, finish, four_rows, new_steps, sum_rows

BLOCK_ROWS = 8  # neighbours that go to one part of down, and the fewest rows of gate that a worker takes
MAX_PARTS = 8  # in which the rows of down are summed


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


# What a worker needs alone for `down_parts`: starts of the parts int64, picked int32 [f], scales f32 [t, f], steps.
DownScratch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def new_down_scratch(d: int, f: int, tokens: int) -> DownScratch:
    """One worker's scratch for `tokens` tokens."""
    return np.zeros(MAX_PARTS + 1, np.int64), np.zeros(f, np.int32), np.zeros((tokens, f), np.float32), new_steps(d)


@kernel
def _wanted(masks, k, stop, t):  # type: ignore[no-untyped-def]
    """Whether any of the next four rows is token t's."""
    any_bit = 0
    for i in range(k, min(k + 4, stop)):
        any_bit |= masks[i]
    return (any_bit >> t) & 1 != 0


@kernel
def gate_and_up(  # type: ignore[no-untyped-def]
    state, workers, ffn, ids, n, masks, inputs, code, skip, given, hidden, places, picked
):  # fmt: skip
    """hidden[t, k] = act(gate . x) * up . x of row ids[k] < n where it is token t's, 0 where not; for the blocks of k
    that this worker takes. Rows whose activation is 0 for every token end there if `skip`.

    given: hidden has the activations already. places, picked: this worker's own scratch, int32 [f].
    """
    count = np.int64(0)  # a literal 0 would have every callee compiled for itself
    block = max(BLOCK_ROWS, min(4 * BLOCK_ROWS, n // (8 * workers) // 4 * 4))
    start = barrier.take(state) * block
    while start < n:
        following = barrier.take(state) * block
        stop = min(start + block, n)
        if not given:
            _first_rows(ffn, ids, start, stop, following, n, masks, inputs, code, hidden)
        for k in range(start, stop):
            live = not skip
            for t in range(hidden.shape[0]):
                live |= hidden[t, k] != 0
            if live:
                places[count], picked[count] = k, ids[k]
                count += 1
        start = following
    if ffn.gate:
        _second_rows(ffn, count, inputs, hidden, places, picked)


@kernel
def _first_rows(ffn, ids, start, stop, following, n, masks, inputs, code, hidden):  # type: ignore[no-untyped-def]
    """The activations of rows ids[start:stop], while those that come next are fetched, in the end ids[following]."""
    weight, bias = (ffn.gate, ffn.gate_bias) if ffn.gate else (ffn.up, ffn.up_bias)
    for k in range(start, stop, 4):
        rows = four_rows(weight, ffn.width, ids, k, n)
        ahead = four_rows(weight, ffn.width, ids, k + 4 if k + 4 < stop else following, n)
        for t in range(hidden.shape[0]):
            if not _wanted(masks, k, stop, t):
                hidden[t, k : min(k + 4, stop)] = 0
                continue
            sums = dot_four(ffn.like, rows, ahead, one_input(inputs, t), ffn.d)
            for i in range(min(4, stop - k)):
                z = sums[i]
                if bias.shape[0]:
                    z += bias[ids[k + i]]
                mine = (masks[k + i] >> t) & 1 != 0
                hidden[t, k + i] = activate(code, z) if mine else np.float32(0)


@kernel
def _second_rows(ffn, count, inputs, hidden, places, picked):  # type: ignore[no-untyped-def]
    """hidden[:, places[i]] *= up . x of row picked[i], for i < count."""
    for k in range(0, count, 4):
        rows = four_rows(ffn.up, ffn.width, picked, k, count)
        ahead = four_rows(ffn.up, ffn.width, picked, k + 4, count)
        for t in range(hidden.shape[0]):
            sums = dot_four(ffn.like, rows, ahead, one_input(inputs, t), ffn.d)
            for i in range(min(4, count - k)):
                u = sums[i]
                if ffn.up_bias.shape[0]:
                    u += ffn.up_bias[picked[k + i]]
                hidden[t, places[k + i]] *= u


@kernel
def sum_parts(f):  # type: ignore[no-untyped-def]
    """Parts in which the rows of down are summed: of the model alone, so that no answer depends on the workers."""
    return max(1, min(MAX_PARTS, f // 1024))


@kernel
def _sort_by_part(ids, n, hidden, skip, parts, starts, picked, scales):  # type: ignore[no-untyped-def]
    """Rows that are not skipped, part after part: ids to `picked`, their hidden to `scales`, each part's first place to
    `starts`; returns how many values of hidden are not 0.

    Blocks of eight neurons go to the parts in turn, as neighbours fire alike in a placement's order.
    """
    fired = np.int64(0)
    starts[: parts + 1] = 0
    for k in range(n):
        live = not skip
        for t in range(hidden.shape[0]):
            fired += hidden[t, k] != 0
            live |= hidden[t, k] != 0
        if live:
            starts[(ids[k] // BLOCK_ROWS) % parts + 1] += 1
    for part in range(parts):
        starts[part + 1] += starts[part]
    for k in range(n):
        live = not skip
        for t in range(hidden.shape[0]):
            live |= hidden[t, k] != 0
        if live:
            part = (ids[k] // BLOCK_ROWS) % parts
            at = starts[part]
            starts[part] += 1
            picked[at] = ids[k]
            for t in range(hidden.shape[0]):
                scales[t, at] = hidden[t, k]
    for part in range(parts, 0, -1):
        starts[part] = starts[part - 1]
    starts[0] = 0
    return fired


@kernel
def down_parts(state, workers, ffn, ids, n, hidden, skip, parts, own, sums, offsets):  # type: ignore[no-untyped-def]
    """Sum hidden . down over the pieces that this worker takes; returns how many values of hidden are not 0.

    A piece is one part of the rows and a slice of the columns, of which there are enough to give every worker some.
    own: this worker's `DownScratch`. sums, offsets: a result of `sum_rows` for each part and token, [parts * t, ...].
    """
    starts, picked, scales, steps = own
    tokens, like = hidden.shape[0], ffn.like
    fired = _sort_by_part(ids, n, hidden, skip, parts, starts, picked, scales)
    unit = columns_unit(like)
    units = (ffn.d + unit - 1) // unit
    slices = max(1, min((2 * workers + parts - 1) // parts, units // 4))
    piece = barrier.take(state)
    while piece < parts * slices:
        after = barrier.take(state)
        part, column = piece // slices, piece % slices
        first, last = unit * (units * column // slices), unit * (units * (column + 1) // slices)
        # The next piece's rows, as far ahead of their columns as this piece's columns are.
        other = min(after, parts * slices - 1)
        shift = column_bytes(like, unit * (units * (other % slices) // slices)) - column_bytes(like, first)
        begin = min(starts[other // slices], max(0, starts[parts] - 1))
        ahead = four_rows(ffn.down + shift, ffn.width, picked, begin, max(1, starts[parts]))
        rows = slice(part * tokens, (part + 1) * tokens)
        sum_rows(
            like, ffn.down, ffn.width, picked, scales, starts[part], starts[part + 1], ahead, ffn.d, first, last,
            sums[rows], offsets[rows], steps,
        )  # fmt: skip
        piece = after
    return fired


@kernel
def merge_parts(worker, workers, like, d, parts, sums, offsets, out):  # type: ignore[no-untyped-def]
    """out[t] += the parts' sums, in order, of this worker's columns."""
    tokens = out.shape[0]
    unit = columns_unit(like)
    units = (d + unit - 1) // unit
    first, last = unit * (units * worker // workers), unit * (units * (worker + 1) // workers)
    for t in range(tokens):
        for part in range(1, parts):
            row = part * tokens + t
            for j in range(first, last):
                sums[t, j] += sums[row, j]
            for b in range(first // BLOCK, last // BLOCK):
                offsets[t, b] += offsets[row, b]
        finish(like, sums[t], offsets[t], d, first, last, out[t])
