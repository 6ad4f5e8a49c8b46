"""Sparse FFN: gate, activation, up and down fused over each token's active neurons.

    out[t] = sum over i in rows(t) of  act(gate[i].x[t] + gb[i]) * (up[i].x[t] + ub[i]) * down[i]      gated
    out[t] = sum over i in rows(t) of  act(up[i].x[t] + ub[i]) * down[i]                               not gated

Weights are neuron-major: row i of gate, up and (transposed) down belong to neuron i. With `skip_zeros`, a neuron whose
activation comes out 0 is left there and its other rows are never read; the sum is the same.

Threads: for one token, and for up to 8 over the union of their rows, workers share the rows of gate and up, meet at
the pool's barrier, and share the columns of down. More tokens are shared out whole. A value of `hidden` is one
worker's, and a column of the sum too, which adds its rows in the order given: the answer is the same, bit for bit, for
any number of workers and whether a token comes alone or among others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels import barrier
from cpu_kernels.activations import ACTIVATION_CODES, activate, activate_ref
from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import Input, new_inputs, one_input, prepare
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import dot_four
from cpu_kernels.row_sum import columns_unit, finish, new_steps, new_sums, sum_rows
from cpu_kernels.worker_pool import WorkerPool

# Rows that a worker takes in turn: in a placement's order the first are nearly neighbours and the last far apart, so
# that whole ranges took one worker 243 us and the other 294.
BLOCK_ROWS = 8
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
def _row_addresses(weight, width, ids, k, n):  # type: ignore[no-untyped-def]
    """Addresses of rows ids[k : k + 4]; beyond the end the last again."""
    last = n - 1
    return (
        weight + ids[min(k, last)] * width,
        weight + ids[min(k + 1, last)] * width,
        weight + ids[min(k + 2, last)] * width,
        weight + ids[min(k + 3, last)] * width,
    )


@kernel
def _wanted(masks, k, stop, t):  # type: ignore[no-untyped-def]
    """Whether any of the next four rows is token t's."""
    any_bit = 0
    for i in range(k, min(k + 4, stop)):
        any_bit |= masks[i]
    return (any_bit >> t) & 1 != 0


@kernel
def first_rows(worker, workers, ffn, ids, n, masks, inputs, code, hidden):  # type: ignore[no-untyped-def]
    """hidden[t, k] = the activation of row ids[k] < n where it is token t's, 0 where not; this worker's blocks of k."""
    weight, bias = (ffn.gate, ffn.gate_bias) if ffn.gate else (ffn.up, ffn.up_bias)
    for start in range(worker * BLOCK_ROWS, n, workers * BLOCK_ROWS):
        for k in range(start, min(start + BLOCK_ROWS, n), 4):
            rows = _row_addresses(weight, ffn.width, ids, k, n)
            following = k + 4 if k + 4 < start + BLOCK_ROWS else start + workers * BLOCK_ROWS
            ahead = _row_addresses(weight, ffn.width, ids, following, n)
            for t in range(hidden.shape[0]):
                if not _wanted(masks, k, n, t):
                    hidden[t, k : min(k + 4, n)] = 0
                    continue
                sums = dot_four(ffn.like, rows, ahead, one_input(inputs, t), ffn.d)
                for i in range(min(4, n - k)):
                    z = sums[i]
                    if bias.shape[0]:
                        z += bias[ids[k + i]]
                    mine = (masks[k + i] >> t) & 1 != 0
                    hidden[t, k + i] = activate(code, z) if mine else np.float32(0)


@kernel
def second_rows(worker, workers, ffn, ids, n, inputs, hidden, skip, places, picked):  # type: ignore[no-untyped-def]
    """hidden[:, k] *= up . x, for this worker's k where some token's hidden is not 0 (for all if not `skip`)."""
    if not ffn.gate:
        return
    count = np.int64(0)
    for start in range(worker * BLOCK_ROWS, n, workers * BLOCK_ROWS):
        for k in range(start, min(start + BLOCK_ROWS, n)):
            live = not skip
            for t in range(hidden.shape[0]):
                live |= hidden[t, k] != 0
            if live:
                places[count], picked[count] = k, ids[k]
                count += 1
    for k in range(0, count, 4):
        rows = _row_addresses(ffn.up, ffn.width, picked, k, count)
        ahead = _row_addresses(ffn.up, ffn.width, picked, k + 4, count)
        for t in range(hidden.shape[0]):
            sums = dot_four(ffn.like, rows, ahead, one_input(inputs, t), ffn.d)
            for i in range(min(4, count - k)):
                u = sums[i]
                if ffn.up_bias.shape[0]:
                    u += ffn.up_bias[picked[k + i]]
                hidden[t, places[k + i]] *= u


@kernel
def down_columns(  # type: ignore[no-untyped-def]
    worker, workers, ffn, ids, n, hidden, skip, picked, scales, steps, sums, offsets, out
):  # fmt: skip
    """out[t] += hidden[t] . down, this worker's columns; returns how many values of hidden are not 0.

    picked, scales: this worker's own scratch, int32 [f] and f32 [t, f]; steps, sums, offsets: as `sum_rows` wants them.
    """
    count = fired = np.int64(0)  # a literal 0 would have every callee compiled for itself
    for k in range(n):
        live = not skip
        for t in range(hidden.shape[0]):
            fired += hidden[t, k] != 0
            live |= hidden[t, k] != 0
        if live:
            picked[count] = ids[k]
            for t in range(hidden.shape[0]):
                scales[t, count] = hidden[t, k]
            count += 1
    unit = columns_unit(ffn.like)
    units = (ffn.d + unit - 1) // unit
    first, last = unit * (units * worker // workers), unit * (units * (worker + 1) // workers)
    sum_rows(ffn.like, ffn.down, ffn.width, picked, scales, count, ffn.d, first, last, sums, offsets, steps)
    for t in range(hidden.shape[0]):
        finish(ffn.like, sums[t], offsets[t], ffn.d, first, last, out[t])
    return fired


@kernel
def _together(  # type: ignore[no-untyped-def]
    worker, workers, state, ffn, code, skip, x, ids, masks, inputs, hidden, places, picked, scales, steps, sums,
    offsets, out, fired
):  # fmt: skip
    """Up to `MAX_BATCH` tokens over the union `ids` of their rows; every worker brings the inputs into form itself."""
    n, d = ids.shape[0], x.shape[1]
    own = inputs[worker]
    for t in range(x.shape[0]):
        own[0][t, :d] = x[t]
        prepare(ffn.like, one_input(own, t), d)
    first_rows(worker, workers, ffn, ids, n, masks, own, code, hidden)
    second_rows(worker, workers, ffn, ids, n, own, hidden, skip, places[worker], picked[worker])
    if barrier.wait(state, workers):
        fired[worker] = down_columns(
            worker,
            workers,
            ffn,
            ids,
            n,
            hidden,
            skip,
            picked[worker],
            scales[worker],
            steps[worker],
            sums,
            offsets,
            out,
        )


@kernel
def _apart(  # type: ignore[no-untyped-def]
    worker, workers, ffn, code, skip, x, rows, starts, masks, inputs, places, picked, scales, steps, sums, offsets,
    out, fired
):  # fmt: skip
    """Whole tokens, one after another, each over its own rows."""
    d = x.shape[1]
    alone, one = np.int64(0), np.int64(1)
    own = inputs[worker]
    hidden = scales[worker][1:2]
    for t in range(worker, x.shape[0], workers):
        ids = rows[starts[t] : starts[t + 1]]
        n = ids.shape[0]
        own[0][0, :d] = x[t]
        prepare(ffn.like, one_input(own, 0), d)
        first_rows(alone, one, ffn, ids, n, masks, own, code, hidden)
        second_rows(alone, one, ffn, ids, n, own, hidden, skip, places[worker], picked[worker])
        fired[worker] += down_columns(
            alone, one, ffn, ids, n, hidden, skip, picked[worker], scales[worker][:1],
            steps[worker], sums[worker : worker + 1], offsets[worker : worker + 1], out[t : t + 1],
        )  # fmt: skip


class SparseFFNScratch:
    """Buffers of `sparse_ffn` for `f` neurons of width `d`, made once; what a worker needs alone has a row for each."""

    def __init__(self, d: int, f: int, workers: int) -> None:
        rows = max(MAX_BATCH, 2)
        self.inputs: tuple[Input, ...] = tuple(new_inputs(MAX_BATCH, d) for _ in range(workers))
        # Flat, so that what a call takes of them is contiguous, and kernels are compiled for one layout.
        self.hidden = np.empty(MAX_BATCH * f, np.float32)
        self.places, self.picked = (np.empty((workers, f), np.int32) for _ in range(2))
        self.scales = np.empty(workers * rows * f, np.float32)
        self.steps = tuple(new_steps(d) for _ in range(workers))
        self.sums, self.offsets = new_sums(max(MAX_BATCH, workers), d)
        self.ones = np.ones(f, np.uint8)
        self.fired = np.zeros(workers, np.int64)


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
    code, f = ACTIVATION_CODES[ffn.activation], ffn.up.shape[0]
    own = (scratch.inputs, scratch.places, scratch.picked)
    sums = (scratch.sums, scratch.offsets)
    scratch.fired[:] = 0
    if tokens > MAX_BATCH:
        scales = scratch.scales[: pool.threads * 2 * f].reshape(pool.threads, 2, f)
        tokens_apart = (ffn.weights, code, skip_zeros, x, rows, offsets, scratch.ones)
        pool.run(_apart, pool.threads, *tokens_apart, *own, scales, scratch.steps, *sums, out, scratch.fired)
        return int(scratch.fired.sum())
    ids, masks = (rows, scratch.ones[: rows.size]) if tokens == 1 else _union(rows, offsets, f)
    hidden = scratch.hidden[: tokens * ids.size].reshape(tokens, -1)
    workers = pool.workers_for(ids.size * ffn.row_bytes)
    args = (pool.barrier, ffn.weights, code, skip_zeros, x, ids, masks, scratch.inputs, hidden)
    scales = scratch.scales[: pool.threads * tokens * f].reshape(pool.threads, tokens, f)
    pool.run(
        _together, workers, *args, scratch.places, scratch.picked, scales, scratch.steps, *sums, out, scratch.fired
    )
    return int(scratch.fired[0])


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
