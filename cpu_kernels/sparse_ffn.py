"""Sparse FFN: gate, activation, up and down fused over each token's active neurons.

    out[t] = sum over i in rows(t) of  act(gate[i].x[t] + gb[i]) * (up[i].x[t] + ub[i]) * down[i]      gated
    out[t] = sum over i in rows(t) of  act(up[i].x[t] + ub[i]) * down[i]                               not gated

Weights are neuron-major: row i of gate, up and (transposed) down belong to neuron i. With `skip_zeros`, a neuron whose
activation comes out 0 is left there and its other rows are never read; the sum is the same.

Threads: with one token, workers share its chunks of rows; with several, each worker takes whole tokens. Chunks depend
on the number of rows alone and are added in order, so the answer is the same, bit for bit, for any number of
workers and whether a token comes alone or among others. No worker waits for another; the caller adds the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from cpu_kernels.activations import ACTIVATION_CODES, activate, activate_ref
from cpu_kernels.lanes import FAST_SUMS, add_scaled, dot, kernel_view, widen_ref
from cpu_kernels.worker_pool import WorkerPool

# A chunk costs one pass over a vector of length d; 64 rows of up to three such vectors make that a few per cent.
_ROWS_PER_CHUNK = 64
MAX_CHUNKS = 16


@dataclass(frozen=True)
class FFNView:
    """One layer's neurons as the kernels see them. Biases and an absent gate are arrays of length 0.

    gate, up, down: [f, d] as `kernel_view` gives them; gate_bias, up_bias: [f] f32.
    """

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray
    up_bias: np.ndarray
    activation: str

    @classmethod
    def of(
        cls,
        gate: torch.Tensor | None,
        up: torch.Tensor,
        down: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        activation: str,
    ) -> FFNView:
        """View contiguous CPU tensors, without a copy. Raises `ValueError` for a misfit or an unknown activation."""
        if activation not in ACTIVATION_CODES:
            raise ValueError(f"unknown activation {activation!r}, known are {', '.join(ACTIVATION_CODES)}")
        f, d = up.shape
        empty = torch.empty(0)
        for name, weight, shape in (
            ("gate", gate, (f, d)),
            ("down", down, (f, d)),
            ("gate_bias", gate_bias, (f,)),
            ("up_bias", up_bias, (f,)),
        ):
            if weight is not None and tuple(weight.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected {shape} beside up {(f, d)}")
        return cls(
            kernel_view(torch.empty(0, d, dtype=up.dtype) if gate is None else gate),
            kernel_view(up),
            kernel_view(down),
            kernel_view(empty if gate_bias is None else gate_bias.float()),
            kernel_view(empty if up_bias is None else up_bias.float()),
            activation,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows that one neuron owns."""
        return self.up.itemsize * self.up.shape[1] * (3 if self.gate.size else 2)


@njit(fastmath=FAST_SUMS, nogil=True, cache=True)
def _add_rows(weights, code, skip, x, rows, ids, hidden, out):  # type: ignore[no-untyped-def]
    """Add the neurons `rows` of one token to out [d]; returns how many of them fired.

    Matrix by matrix, so that the next row to be read is always known; ids and hidden are scratch of a chunk's length.
    """
    gate, up, down, gate_bias, up_bias = weights
    first, first_bias = (gate, gate_bias) if gate.shape[0] else (up, up_bias)
    count = fired = 0
    n = rows.shape[0]
    for k in range(n):
        i = rows[k]
        z = dot(first[i], x, first[rows[min(k + 1, n - 1)]])
        if first_bias.shape[0]:
            z += first_bias[i]
        h = activate(code, z)
        fired += h != 0
        if h != 0 or not skip:
            ids[count], hidden[count] = i, h
            count += 1
    if gate.shape[0]:
        for k in range(count):
            i = ids[k]
            u = dot(up[i], x, up[ids[min(k + 1, count - 1)]])
            if up_bias.shape[0]:
                u += up_bias[i]
            hidden[k] *= u
    for k in range(count):
        add_scaled(down[ids[k]], hidden[k], out, down[ids[min(k + 1, count - 1)]])
    return fired


@njit(nogil=True, inline="always")
def _chunks(n):  # type: ignore[no-untyped-def]
    return max(1, min(MAX_CHUNKS, n // _ROWS_PER_CHUNK))


@njit(nogil=True, cache=True)
def _one_token(worker, workers, weights, code, skip, x, rows, ids, hidden, parts, fired):  # type: ignore[no-untyped-def]
    n, chunks = rows.shape[0], _chunks(rows.shape[0])
    for c in range(worker, chunks, workers):
        parts[c] = 0
        chunk = rows[n * c // chunks : n * (c + 1) // chunks]
        fired[c] = _add_rows(weights, code, skip, x, chunk, ids[worker], hidden[worker], parts[c])


@njit(nogil=True, cache=True)
def _merge(parts, fired, rows, out):  # type: ignore[no-untyped-def]
    total = 0
    for c in range(_chunks(rows.shape[0])):
        total += fired[c]
        for j in range(out.shape[0]):
            out[j] += parts[c, j]
    return total


@njit(nogil=True, cache=True)
def _many_tokens(worker, workers, weights, code, skip, x, rows, offsets, ids, hidden, part, out, fired):  # type: ignore[no-untyped-def]
    for t in range(worker, x.shape[0], workers):
        mine = rows[offsets[t] : offsets[t + 1]]
        n, chunks = mine.shape[0], _chunks(mine.shape[0])
        fired[t] = 0
        for c in range(chunks):
            part[worker] = 0
            chunk = mine[n * c // chunks : n * (c + 1) // chunks]
            fired[t] += _add_rows(weights, code, skip, x[t], chunk, ids[worker], hidden[worker], part[worker])
            for j in range(out.shape[1]):
                out[t, j] += part[worker, j]


class SparseFFNScratch:
    """Buffers of `sparse_ffn` for `f` neurons of width `d`, made once; what a worker needs alone has a row for each."""

    def __init__(self, d: int, f: int, workers: int) -> None:
        self.ids = np.empty((workers, f), np.int32)
        self.hidden = np.empty((workers, f), np.float32)
        self.parts = np.empty((max(MAX_CHUNKS, workers), d), np.float32)
        self.fired = np.empty(MAX_CHUNKS, np.int64)


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

    x: [t, d] f32. Token t's neurons are rows[offsets[t]:offsets[t + 1]], int32 ids below f (not checked, as on every
    token); offsets: int64 [t + 1]. Raises `ValueError` when shapes or types do not fit.
    """
    tokens, d = x.shape
    if d != ffn.up.shape[1] or out.shape != x.shape or offsets.shape != (tokens + 1,):
        raise ValueError(f"sparse_ffn shapes do not fit: x {x.shape}, out {out.shape}, offsets {offsets.shape}")
    if x.dtype != np.float32 or out.dtype != np.float32 or rows.dtype != np.int32 or offsets.dtype != np.int64:
        raise ValueError(f"sparse_ffn wants f32 x and out, int32 rows, int64 offsets; got {x.dtype}, {rows.dtype}")
    weights, code = (ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias), ACTIVATION_CODES[ffn.activation]
    scratch_rows = (scratch.ids, scratch.hidden)
    if not rows.size:
        return 0
    if tokens == 1:
        workers = pool.workers_for(rows.size * ffn.row_bytes)
        pool.run(
            _one_token, workers, weights, code, skip_zeros, x[0], rows, *scratch_rows, scratch.parts, scratch.fired
        )
        return _merge(scratch.parts, scratch.fired, rows, out[0])
    fired = np.empty(tokens, np.int64)
    pool.run(
        _many_tokens,
        pool.threads,
        weights,
        code,
        skip_zeros,
        x,
        rows,
        offsets,
        *scratch_rows,
        scratch.parts,
        out,
        fired,
    )
    return int(fired.sum())


def sparse_ffn_ref(ffn: FFNView, x: np.ndarray, rows: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> int:
    """`sparse_ffn` in torch, in f64, one token at a time; every row given is computed."""
    total = 0
    for t in range(x.shape[0]):
        mine = rows[offsets[t] : offsets[t + 1]]
        token = torch.from_numpy(x[t]).double()

        def project(
            weight: np.ndarray, bias: np.ndarray, ids: np.ndarray = mine, v: torch.Tensor = token
        ) -> torch.Tensor:
            z = torch.from_numpy(widen_ref(weight[ids])).double() @ v
            return z + torch.from_numpy(bias[ids]) if bias.size else z

        first = project(ffn.gate, ffn.gate_bias) if ffn.gate.size else project(ffn.up, ffn.up_bias)
        hidden = activate_ref(ffn.activation, first)
        total += int((hidden != 0).sum())
        if ffn.gate.size:
            hidden = hidden * project(ffn.up, ffn.up_bias)
        out[t] += (hidden @ torch.from_numpy(widen_ref(ffn.down[mine])).double()).float().numpy()
    return total
