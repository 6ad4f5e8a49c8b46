"""Sparse FFN: gate, activation, up and down fused over each token's active neurons.

    out[t] = sum over i in rows(t) of  act(gate[i].x[t] + gb[i]) * (up[i].x[t] + ub[i]) * down[i]      gated
    out[t] = sum over i in rows(t) of  act(up[i].x[t] + ub[i]) * down[i]                               not gated

With dReLU it is relu(up . x) that multiplies. Weights are neuron-major: row i of gate, up and (transposed) down belong
to neuron i. With `skip_zeros`, a neuron whose activation comes out 0 is left there and its other rows are never read;
the sum is the same.

Threads: for one token, and for up to 32 over the union of their rows, workers take blocks of rows of gate and up, meet
at the pool's barrier, take pieces of down, which are a part of its rows and a slice of their columns, meet again, and
each adds the parts of its columns. Who takes what depends on who is faster: on 16 cores of a shared host fixed shares
waited 40% longer for the slowest. A slice of all rows for each worker, without parts, took twice as long there: pieces
of rows of 256 bytes. More than 32 tokens are shared out whole. A value of `hidden` is one worker's, a row's part is
that of its number and parts are added in order: the answer is the same, bit for bit, for any number of workers, with or
without `skip_zeros`, and alone or beside any other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cpu_kernels import barrier
from cpu_kernels.activations import activate_ref, activate_up_ref
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import MAX_BATCH, activation_word
from cpu_kernels.ffn_phases import (
    FFNWeights,
    count_fired,
    down_parts,
    gate_and_up,
    merge_parts,
    new_down_scratch,
    sum_parts,
)
from cpu_kernels.inputs import copy, new_inputs, one_input
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import prepare
from cpu_kernels.row_sum import new_sums
from cpu_kernels.worker_pool import Each, WorkerPool

_NOT_GIVEN = np.bool_(False)  # plain False is a type of its own, for which all phases would be compiled once more


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
        activation_word(activation)
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
def _together(  # type: ignore[no-untyped-def]
    worker, workers, state, ffn, word, skip, x, ids, masks, parts, mine, hidden, places, own, sums, offsets, out, fired
):  # fmt: skip
    """Up to `MAX_BATCH` tokens over the union `ids` of their rows, which are read once; every worker brings the inputs
    into form itself."""
    n, d = ids.shape[0], x.shape[1]
    for t in range(x.shape[0]):
        copy(x[t], d, mine[0][t])
        prepare(ffn.like, one_input(mine, t), d)
    likely = not skip or n < len(places)
    gate_and_up(state, workers, ffn, ids, n, masks, mine, word, skip, likely, _NOT_GIVEN, hidden, places, own[1])
    if not barrier.wait(state, workers):
        return
    if worker == 0:
        fired[0] = count_fired(hidden, n)
    down_parts(state, workers, ffn, ids, n, hidden, skip, parts, own, sums, offsets)
    if barrier.wait(state, workers):
        merge_parts(worker, workers, ffn.like, d, parts, sums, offsets, out)


@kernel
def _apart(  # type: ignore[no-untyped-def]
    worker, workers, state, ffn, word, skip, x, rows, starts, masks, parts, mine, hidden, places, own, sums, offsets,
    out, fired
):  # fmt: skip
    """Whole tokens, one after another, each over its own rows."""
    d = x.shape[1]
    alone, one = np.int64(0), np.int64(1)
    for t in range(worker, x.shape[0], workers):
        ids = rows[starts[t] : starts[t + 1]]
        n = ids.shape[0]
        copy(x[t], d, mine[0][0])
        prepare(ffn.like, one_input(mine, 0), d)
        barrier.restart(state)
        likely = not skip or n < len(places)
        gate_and_up(state, one, ffn, ids, n, masks, mine, word, skip, likely, _NOT_GIVEN, hidden, places, own[1])
        barrier.restart(state)
        fired[worker] += count_fired(hidden, n)
        down_parts(state, one, ffn, ids, n, hidden, skip, parts, own, sums, offsets)
        merge_parts(alone, one, ffn.like, d, parts, sums, offsets, out[t : t + 1])


class SparseFFNScratch:
    """Buffers of `sparse_ffn` for `f` neurons of width `d` and a pool of `workers`, made once, some when first used."""

    def __init__(self, d: int, f: int, workers: int) -> None:
        self.d, self.f, self.workers, self.parts = d, f, workers, int(sum_parts(f))
        self.inputs = Each(new_inputs(MAX_BATCH, d) for _ in range(workers))
        self.places = Each(np.empty(f, np.int32) for _ in range(workers))
        # Flat, so that what a call takes of it is contiguous, and kernels are compiled for one layout.
        self.hidden = np.empty(MAX_BATCH * f, np.float32)
        self.ones = np.full(f, 2**MAX_BATCH - 1, np.uint32)
        self.fired = np.zeros(workers, np.int64)
        self.owns = Each(new_down_scratch(d, f) for _ in range(workers))
        self._sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}

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
    word, f, s = activation_word(ffn.activation), ffn.up.shape[0], scratch
    s.fired[:] = 0
    if tokens > MAX_BATCH:
        states, hiddens, sums, taken = s.apart
        given = (ffn.weights, word, skip_zeros, x, rows, offsets, s.ones, s.parts)
        buffers = (s.inputs, hiddens, s.places, s.owns, sums, taken)
        pool.run(_apart, pool.threads, states, *given, *buffers, out, s.fired)
        return int(s.fired.sum())
    ids, masks = (rows, s.ones[: rows.size]) if tokens == 1 else _union(rows, offsets, f)
    hidden = s.hidden[: tokens * ids.size].reshape(tokens, -1)
    what = (ffn.weights, word, skip_zeros, x, ids, masks, s.parts)
    own = (s.inputs, hidden, s.places, s.owns, *s.sums(s.parts * tokens))
    pool.run(_together, pool.workers_for(ids.size * ffn.row_bytes), pool.barrier, *what, *own, out, s.fired)
    return int(s.fired[0])


def _union(rows: np.ndarray, offsets: np.ndarray, f: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows of several tokens, rising, and a mask for each whose bit t is set where it is token t's."""
    masks = np.zeros(f, np.uint32)
    for t in range(len(offsets) - 1):
        masks[rows[offsets[t] : offsets[t + 1]]] |= np.uint32(1 << t)
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
        if ffn.gate is not None:
            hidden = hidden * activate_up_ref(ffn.activation, project(ffn.up, ffn.up_bias))
        total += int((hidden != 0).sum())
        out[t] += (hidden @ ffn.down.widen(mine).double()).float().numpy()
    return total
