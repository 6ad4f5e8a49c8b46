"""Sparse FFN: gate, activation, up and down fused over each token's active neurons.

    out[t] = sum over i in rows(t) of  act(gate[i].x[t] + gb[i]) * (up[i].x[t] + ub[i]) * down[i]      gated
    out[t] = sum over i in rows(t) of  act(up[i].x[t] + ub[i]) * down[i]                               not gated

Weights are neuron-major: row i of gate, up and (transposed) down belong to neuron i. With `skip_zeros`, a neuron whose
activation comes out 0 is left there and its other rows are never read; the sum is the same.

Threads: for one token, and for up to 8 over the union of their rows, workers take blocks of rows of gate and up, meet
at the pool's barrier, take pieces of down, which are a part of its rows and a slice of their columns, meet again, and
each adds the parts of its columns. Who takes what depends on who is faster: on 16 cores of a shared host fixed shares
waited 40% longer for the slowest. A slice of all rows for each worker, without parts, took twice as long there: pieces
of rows of 256 bytes. More than 8 tokens are shared out whole. A value of `hidden` is one worker's, the parts depend on
a neuron's number alone and are added in order: the answer is the same, bit for bit, for any number of workers, whether
a token comes alone or among others, and with or without `skip_zeros`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels import barrier
from cpu_kernels.activations import ACTIVATION_CODES, activate, activate_ref
from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import new_inputs, one_input, prepare
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import dot_four
from cpu_kernels.row_sum import column_bytes, columns_unit, finish, four_rows, new_steps, new_sums, sum_rows
from cpu_kernels.worker_pool import Each, WorkerPool

BLOCK_ROWS = 8  # neighbours that go to one part of down, and the fewest rows of gate that a worker takes
MAX_PARTS = 8  # in which the rows of down are summed
MAX_BATCH = 8  # tokens whose rows are read once, as their union


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


@dataclass(frozen=True, eq=False)
class FFNView:
    """One layer's neurons as the kernels see them: [f, d] matrices of one type, and biases f32 [f] or of length 0."""

    gate: Matrix | None
    up: Matrix
    down: Matrix
    gate_bias: np.ndarray
    up_bias: np.ndarray
    activation: str

    @classmethod
    def of(
        cls,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        activation: str,
    ) -> FFNView:
        """Raises `ValueError` for a misfit or an unknown activation."""
        if activation not in ACTIVATION_CODES:
            raise ValueError(f"unknown activation {activation!r}, known are {', '.join(ACTIVATION_CODES)}")
        for name, part in (("gate", gate), ("down", down)):
            if part is not None and (part.shape != up.shape or part.dtype != up.dtype):
                raise ValueError(f"{name} has shape {part.shape} of {part.dtype}, up is {up.shape} of {up.dtype}")
        biases: list[np.ndarray] = []
        for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
            if bias is not None and tuple(bias.shape) != (up.shape[0],):
                raise ValueError(
                    f"{name} has shape {tuple(bias.shape)}, expected {(up.shape[0],)} beside up {up.shape}"
                )
            biases.append(np.empty(0, np.float32) if bias is None else bias.float().contiguous().numpy())
        return cls(gate, up, down, biases[0], biases[1], activation)

    @property
    def weights(self) -> FFNWeights:
        """The form in which kernels take it; valid as long as the view."""
        gate = 0 if self.gate is None else self.gate.rows.ctypes.data
        up, down = self.up.rows.ctypes.data, self.down.rows.ctypes.data
        sizes = self.up.row_bytes, self.up.columns
        return FFNWeights(self.up.like, gate, up, down, *sizes, self.gate_bias, self.up_bias)

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows that one neuron owns."""
        return self.up.row_bytes * (3 if self.gate is not None else 2)


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
            for b in range(first // 32, last // 32):
                offsets[t, b] += offsets[row, b]
        finish(like, sums[t], offsets[t], d, first, last, out[t])


@kernel
def _together(  # type: ignore[no-untyped-def]
    worker, workers, state, ffn, code, skip, x, ids, masks, parts, mine, hidden, places, own, sums, offsets, out, fired
):  # fmt: skip
    """Up to `MAX_BATCH` tokens over the union `ids` of their rows; every worker brings the inputs into form itself."""
    n, d = ids.shape[0], x.shape[1]
    for t in range(x.shape[0]):
        mine[0][t, :d] = x[t]
        prepare(ffn.like, one_input(mine, t), d)
    gate_and_up(state, workers, ffn, ids, n, masks, mine, code, skip, False, hidden, places, own[1])
    if not barrier.wait(state, workers):
        return
    fired[worker] = down_parts(state, workers, ffn, ids, n, hidden, skip, parts, own, sums, offsets)
    if barrier.wait(state, workers):
        merge_parts(worker, workers, ffn.like, d, parts, sums, offsets, out)


@kernel
def _apart(  # type: ignore[no-untyped-def]
    worker, workers, state, ffn, code, skip, x, rows, starts, masks, parts, mine, hidden, places, own, sums, offsets,
    out, fired
):  # fmt: skip
    """Whole tokens, one after another, each over its own rows."""
    d = x.shape[1]
    alone, one = np.int64(0), np.int64(1)
    for t in range(worker, x.shape[0], workers):
        ids = rows[starts[t] : starts[t + 1]]
        n = ids.shape[0]
        mine[0][0, :d] = x[t]
        prepare(ffn.like, one_input(mine, 0), d)
        barrier.restart(state)
        gate_and_up(state, one, ffn, ids, n, masks, mine, code, skip, False, hidden, places, own[1])
        barrier.restart(state)
        fired[worker] += down_parts(
            state, one, ffn, ids, n, hidden, skip, parts, own, sums, offsets
        )  # fmt: skip
        merge_parts(alone, one, ffn.like, d, parts, sums, offsets, out[t : t + 1])


# What a worker needs alone for `down_parts`: starts of the parts int64, picked int32 [f], scales f32 [t, f], steps.
DownScratch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def new_down_scratch(d: int, f: int, tokens: int) -> DownScratch:
    """One worker's scratch for `tokens` tokens."""
    return np.zeros(MAX_PARTS + 1, np.int64), np.zeros(f, np.int32), np.zeros((tokens, f), np.float32), new_steps(d)


class SparseFFNScratch:
    """Buffers of `sparse_ffn` for `f` neurons of width `d` and a pool of `workers`, made once, some when first used."""

    def __init__(self, d: int, f: int, workers: int) -> None:
        self.d, self.f, self.workers, self.parts = d, f, workers, int(sum_parts(f))
        self.inputs = Each(new_inputs(MAX_BATCH, d) for _ in range(workers))
        self.places = Each(np.empty(f, np.int32) for _ in range(workers))
        # Flat, so that what a call takes of it is contiguous, and kernels are compiled for one layout.
        self.hidden = np.empty(MAX_BATCH * f, np.float32)
        self.ones = np.ones(f, np.uint8)
        self.fired = np.zeros(workers, np.int64)
        self._owns: dict[int, Each] = {}
        self._sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def owns(self, tokens: int) -> Each:
        """A `DownScratch` for each worker."""
        if tokens not in self._owns:
            self._owns[tokens] = Each(new_down_scratch(self.d, self.f, tokens) for _ in range(self.workers))
        return self._owns[tokens]

    def sums(self, results: int) -> tuple[np.ndarray, np.ndarray]:
        """Room for so many results of `sum_rows`."""
        if results not in self._sums:
            self._sums[results] = new_sums(results, self.d)
        return self._sums[results]

    @cached_property
    def apart(self) -> tuple[Each, Each, Each, Each]:
        """For whole tokens, for each worker: a state to take pieces of work from, hidden f32 [1, f], sums, offsets."""
        sums = [new_sums(self.parts, self.d) for _ in range(self.workers)]
        return (
            Each(barrier.new_barrier() for _ in range(self.workers)),
            Each(np.empty((1, self.f), np.float32) for _ in range(self.workers)),
            Each(pair[0] for pair in sums),
            Each(pair[1] for pair in sums),
        )


def sparse_ffn(
    ffn: FFNView,
    x: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
    scratch: SparseFFNScratch,
    pool: WorkerPool,
    skip_zeros: bool = True,
) -> int:
    """Add each token's active neurons to `out` [t, d] f32 and return how many of them fired (activation not 0).

    x: [t, d] f32. Token t's neurons are rows[offsets[t]:offsets[t + 1]], int32 ids below f in rising order (not
    checked, as on every token); offsets: int64 [t + 1]. Raises `ValueError` when shapes or types do not fit.
    """
    tokens, d = x.shape
    if d != ffn.up.columns or out.shape != x.shape or offsets.shape != (tokens + 1,):
        raise ValueError(f"sparse_ffn shapes do not fit: x {x.shape}, out {out.shape}, offsets {offsets.shape}")
    if x.dtype != np.float32 or out.dtype != np.float32 or rows.dtype != np.int32 or offsets.dtype != np.int64:
        raise ValueError(f"sparse_ffn wants f32 x and out, int32 rows, int64 offsets; got {x.dtype}, {rows.dtype}")
    if not rows.size:
        return 0
    code, f, s = ACTIVATION_CODES[ffn.activation], ffn.up.shape[0], scratch
    s.fired[:] = 0
    if tokens > MAX_BATCH:
        states, hiddens, sums, taken = s.apart
        given = (ffn.weights, code, skip_zeros, x, rows, offsets, s.ones, s.parts)
        buffers = (s.inputs, hiddens, s.places, s.owns(1), sums, taken)
        pool.run(_apart, pool.threads, states, *given, *buffers, out, s.fired)
        return int(s.fired.sum())
    ids, masks = (rows, s.ones[: rows.size]) if tokens == 1 else _union(rows, offsets, f)
    hidden = s.hidden[: tokens * ids.size].reshape(tokens, -1)
    what = (ffn.weights, code, skip_zeros, x, ids, masks, s.parts)
    own = (s.inputs, hidden, s.places, s.owns(tokens), *s.sums(s.parts * tokens))
    pool.run(_together, pool.workers_for(ids.size * ffn.row_bytes), pool.barrier, *what, *own, out, s.fired)
    return int(s.fired[0])


def _union(rows: np.ndarray, offsets: np.ndarray, f: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows of several tokens, rising, and a byte for each whose bit t is set where it is token t's."""
    masks = np.zeros(f, np.uint8)
    for t in range(len(offsets) - 1):
        masks[rows[offsets[t] : offsets[t + 1]]] |= np.uint8(1 << t)
    ids = np.flatnonzero(masks).astype(np.int32)
    return ids, masks[ids]


def sparse_ffn_ref(ffn: FFNView, x: np.ndarray, rows: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> int:
    """`sparse_ffn` in torch, in f64, one token at a time; every row given is computed."""
    total = 0
    for t in range(x.shape[0]):
        mine = rows[offsets[t] : offsets[t + 1]]
        token = torch.from_numpy(x[t]).double()

        def project(weight: Matrix, bias: np.ndarray, ids: np.ndarray = mine, v: torch.Tensor = token) -> torch.Tensor:
            z = weight.widen(ids).double() @ v
            return z + torch.from_numpy(bias[ids]) if bias.size else z

        first = project(ffn.up, ffn.up_bias) if ffn.gate is None else project(ffn.gate, ffn.gate_bias)
        hidden = activate_ref(ffn.activation, first)
        total += int((hidden != 0).sum())
        if ffn.gate is not None:
            hidden = hidden * project(ffn.up, ffn.up_bias)
        out[t] += (hidden @ ffn.down.widen(mine).double()).float().numpy()
    return total
