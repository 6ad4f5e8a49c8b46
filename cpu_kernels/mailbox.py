"""The CPU's end of the mailbox: workers that compute what the GPU asks for in the middle of its decode step.

Threads: every worker of a `WorkerPool` runs `serve` for the length of an answer. The GPU writes a request and its input
to pinned host memory and then the request's number, which workers poll; they compute together, meeting at the pool's
barrier; the last to finish writes the result's number, which the GPU polls. There is no launch, no lock and no Python
on the way. Between requests workers poll, so that they are hot, and nap once nothing has come for some milliseconds.
They go home when `stop` is called, or with the barrier's `abort`.

    FFN     out = FFN of the given neurons of a layer, for 1 to 32 rows
    LAYER   out = a whole layer, attention and KV write included; the rows' places are in the step's shared buffers
    HEAD    shared.logits = head of every row
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels import barrier
from cpu_kernels.addresses import floats
from cpu_kernels.barrier import NAP_MICROSECONDS, fetch_add, load_acquire, nap, pause, store_release
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import MAX_BATCH, Flag, Op, Word
from cpu_kernels.decode_attention import attention
from cpu_kernels.decode_buffers import DENSE, Column
from cpu_kernels.decode_ffn import ffn
from cpu_kernels.decode_parts import row_bytes
from cpu_kernels.decode_step import head
from cpu_kernels.ffn_phases import FFNWeights, down_parts, gate_and_up, merge_parts
from cpu_kernels.inputs import copy, one_input
from cpu_kernels.row_dot import prepare
from cpu_kernels.row_types import columns_unit

# Polls before the first nap: some 2 ms, longer than the GPU takes between two requests of a token.
_SPINS = 60_000
# Naps as short as the barrier's before longer ones: where the system's timer is dear, as on some virtual machines, one
# of 20 us takes 125 and 46 us of a core, so that two idle workers took a third of their time.
_SHORT_NAPS, _LONG_NAP_MICROSECONDS = 50, 500


class Box(NamedTuple):
    """What both sides see, in pinned host memory: request and flags int64, whose words `contract.py` names, inputs x
    f32 [32, d], neurons' ids int32 [f] and their rows masks uint32 [f], bit t for row t, and the result out f32
    [32, d]."""

    request: np.ndarray
    flags: np.ndarray
    x: np.ndarray
    ids: np.ndarray
    masks: np.ndarray
    out: np.ndarray


def stop(box: Box) -> None:
    """Send the workers home; a request that they are at may stay unanswered."""
    box.flags[Flag.STOP] = 1


@subroutine
def _take_inputs(box, like, d, tokens, inputs):  # type: ignore[no-untyped-def]
    """Bring the inputs of some tokens into form: 10 us where 14 workers read what the GPU has just written."""
    for t in range(tokens):
        copy(box.x[t], d, inputs[0][t])
        prepare(like, one_input(inputs, t), d)


@subroutine
def _requested(box, state, number, posted, like, d, inputs):  # type: ignore[no-untyped-def]
    """Wait for request `number`, and meanwhile take an input that comes ahead of it, when it is not that of `posted`.

    Returns whether the request came, False when told to go home, and the number of the input taken last.
    """
    spins, one = 0, np.int64(1)
    while load_acquire(box.request, Word.NUMBER) < number:
        if load_acquire(box.flags, Flag.STOP) != 0 or barrier.is_aborted(state):
            return False, posted
        now = load_acquire(box.request, Word.POSTED)
        if now != posted:
            posted, spins = now, 0
            _take_inputs(box, like, d, one, inputs)
        elif spins < _SPINS:
            spins += 1
            pause()
        else:
            spins += 1
            nap(NAP_MICROSECONDS if spins < _SPINS + _SHORT_NAPS else _LONG_NAP_MICROSECONDS)
    return True, posted


@subroutine
def _cold_ffn(worker, workers, state, box, like, row, shape, shared, own, posted):  # type: ignore[no-untyped-def]
    """box.out = the FFN of the request's neurons; up to the last phase, after which workers need not meet."""
    d, f, tokens, count = shape.d, shape.f, box.request[Word.TOKENS], box.request[Word.COUNT]
    skip, first = shape.strategy != DENSE, row[Column.HOT]
    n = f - first if count < 0 else count
    ids = shared.every[first:f] if count < 0 else box.ids[:n]
    unit = columns_unit(like)
    units = (d + unit - 1) // unit
    columns = slice(unit * (units * worker // workers), unit * (units * (worker + 1) // workers))
    box.out[:tokens, columns] = 0
    if n == 0:
        return True
    if tokens > 1 or posted == 0 or box.request[Word.POSTED] != posted:
        _take_inputs(box, like, d, tokens, own.inputs)
    biases = floats(row[Column.GATE_BIAS], f), floats(row[Column.UP_BIAS], f)
    matrices = row[Column.GATE], row[Column.UP], row[Column.DOWN]
    weights = FFNWeights(like, matrices[0], matrices[1], matrices[2], row_bytes(like, d), d, biases[0], biases[1])
    hidden = shared.hidden[: tokens * n].reshape(tokens, n)
    masks = shared.ones[:n] if count < 0 or tokens == 1 else box.masks[:n]
    given = np.bool_(False)  # plain False is a type of its own
    likely = count >= 0 or not skip
    gate_and_up(
        state, workers, weights, ids, n, masks, own.inputs, shape.activation, skip, likely, given, hidden, own.places,
        own.down[1],
    )  # fmt: skip
    if not barrier.wait(state, workers):
        return False
    parts = shared.sums.shape[0] // MAX_BATCH
    sums, offsets = shared.sums[: parts * tokens], shared.offsets[: parts * tokens]
    down_parts(state, workers, weights, ids, n, hidden, skip, parts, own.down, sums, offsets)
    if not barrier.wait(state, workers):
        return False
    merge_parts(worker, workers, like, d, parts, sums, offsets, box.out[:tokens])
    return True


@subroutine
def _layer(worker, workers, state, box, likes, row, shape, eps, rotation, shared, own):  # type: ignore[no-untyped-def]
    """box.out = one layer of box.x."""
    rows = box.request[Word.TOKENS]
    _take_x(worker, box, rows, shape.d, shared)
    if not barrier.wait(state, workers):
        return False
    if not attention(worker, workers, state, likes, row, rows, shape, eps, rotation, shared, own):
        return False
    if not ffn(worker, workers, state, likes[1], likes[5], row, rows, shape, eps, shared, own):
        return False
    if not barrier.wait(state, workers):
        return False
    if worker == 0:
        for t in range(rows):
            copy(shared.x[t], shape.d, box.out[t])
    return True


@subroutine
def _take_x(worker, box, rows, d, shared):  # type: ignore[no-untyped-def]
    if worker == 0:
        for t in range(rows):
            copy(box.x[t], d, shared.x[t])


@subroutine
def _head(worker, workers, state, box, likes, ends, shape, eps, shared, own):  # type: ignore[no-untyped-def]
    """shared.logits of the request's rows."""
    rows, first = box.request[Word.TOKENS], np.int64(0)
    _take_x(worker, box, rows, shape.d, shared)
    if not barrier.wait(state, workers):
        return False
    return head(worker, workers, state, likes[2], ends, first, rows, shape, eps, shared, own)


@kernel
def serve(worker, workers, state, box, likes, table, shape, eps, rotation, shared, own):  # type: ignore[no-untyped-def]
    """Answer requests until told to go home; arguments as for `decode_step`.

    The GPU counts requests on; the first is one more than the result that was done last.
    """
    number = load_acquire(box.flags, Flag.DONE)
    if not barrier.wait(state, workers):  # before anyone can write another number there
        return
    if worker == 0:
        store_release(box.flags, Flag.READY, 1)
    like, d, none = likes[1], shape.d, np.int64(0)
    came, posted = _requested(box, state, number + 1, none, like, d, own.inputs)
    while came:
        number += 1
        op, row = box.request[Word.OP], table[box.request[Word.LAYER]]
        if op == Op.FFN:
            fine = _cold_ffn(worker, workers, state, box, like, row, shape, shared, own, posted)
            # Of several inputs none is kept; of one, that of this request.
            posted = none if box.request[Word.TOKENS] > 1 else box.request[Word.POSTED]
        elif op == Op.LAYER:
            posted = none
            fine = _layer(worker, workers, state, box, likes, row, shape, eps, rotation, shared, own)
        else:
            posted = none
            fine = _head(worker, workers, state, box, likes, row, shape, eps, shared, own)
        if not fine:
            return
        if fetch_add(box.flags, Flag.ARRIVED, 1) == workers - 1:
            store_release(box.flags, Flag.ARRIVED, 0)
            store_release(box.flags, Flag.DONE, number)
        came, posted = _requested(box, state, number + 1, posted, like, d, own.inputs)
    barrier.leave(state)  # another may have seen a request that came with the stop, and would wait for this one
