"""Proxy: which neurons of a model whose activation is never 0 are worth computing for a token, by low-bit copies.

    score(i) = |act(gate~[i] . x + gb[i]) * (up~[i] . x + ub[i])| * length[i]        gated
    score(i) = |act(up~[i] . x + ub[i])| * length[i]                                 not gated
    passes(i)  where  score(i) >= threshold

gate~ and up~ are the layer's rows in blocks of fewer bits, length[i] that of neuron i's row of down: the score is, but
for rounding, how far the neuron would move the layer's output. Errors of the copies only change which neurons pass;
those that do are computed with the weights themselves. Rows are read as four streams of each matrix, as in `gemv.py`.

Threads: each worker takes a range of rows, ids are written per range and copied together in order, as in `low_rank.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import activation_word
from cpu_kernels.gemv import AHEAD
from cpu_kernels.inputs import copy, new_inputs, one_input
from cpu_kernels.matrix import Matrix
from cpu_kernels.row_dot import dot_four, prepare
from cpu_kernels.worker_pool import Each, WorkerPool

_NONE = np.empty(0, np.float32)


class Copies(NamedTuple):
    """A layer's copies in compiled code: the type of a row, addresses of the rows (gate 0 for none), bytes of a row,
    its columns, biases f32 [f] (of length 0 for none), lengths f32 [f] of the rows of down."""

    like: np.ndarray
    gate: int
    up: int
    width: int
    d: int
    gate_bias: np.ndarray
    up_bias: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class ProxyView:
    """One layer's proxy as the kernels see it.

    gate (None where the FFN has none), up: rows of the layer in blocks; lengths: f32 [f]; biases f32 [f] or None, those
    of the layer itself. Raises `ValueError` for shapes that do not fit, as kernels would read beyond them.
    """

    gate: Matrix | None
    up: Matrix
    lengths: np.ndarray
    threshold: np.float32
    activation: str
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        f = self.up.shape[0]
        if not self.up.kind.layout.in_blocks:
            raise ValueError(f"a proxy's rows are in blocks, got {self.up.dtype}")
        if self.gate is not None and (self.gate.shape, self.gate.dtype) != (self.up.shape, self.up.dtype):
            raise ValueError(f"a proxy's gate is {self.gate.dtype} {self.gate.shape}, up {self.up.shape}")
        for name, part in (("lengths", self.lengths), ("gate_bias", self.gate_bias), ("up_bias", self.up_bias)):
            if part is not None and (part.shape != (f,) or part.dtype != np.float32 or not part.flags.c_contiguous):
                raise ValueError(f"a proxy's {name} is {part.dtype} {part.shape}, expected float32 {(f,)}")

    @property
    def nbytes(self) -> int:
        """Bytes that naming the neurons of one token reads."""
        return self.up.nbytes + (0 if self.gate is None else self.gate.nbytes) + self.lengths.nbytes

    def copies(self) -> Copies:
        """What compiled code takes."""
        gate = 0 if self.gate is None else self.gate.rows.ctypes.data
        first, second = (_NONE if bias is None else bias for bias in (self.gate_bias, self.up_bias))
        up = self.up
        return Copies(up.like, gate, up.rows.ctypes.data, up.row_bytes, up.columns, first, second, self.lengths)


@subroutine(forceinline=True)
def _products(like, weight, width, at, v, d):  # type: ignore[no-untyped-def]
    """The four rows `at` of the matrix at address `weight` times v."""
    i0, i1, i2, i3 = at
    rows = weight + i0 * width, weight + i1 * width, weight + i2 * width, weight + i3 * width
    r0, r1, r2, r3 = rows
    return dot_four(like, rows, (r0 + AHEAD, r1 + AHEAD, r2 + AHEAD, r3 + AHEAD), v, d)


@subroutine
def passing_rows(copies, start, stop, inputs, tokens, word, threshold, ids, masks):  # type: ignore[no-untyped-def]
    """Write those of rows start to stop whose score passes for some token to `ids`, and for which to `masks` uint32,
    bit t for token t; return how many there are. `inputs` are in their 16-bit form."""
    quarter, last = (stop - start + 3) // 4, stop - start - 1
    first, first_bias = (copies.gate, copies.gate_bias) if copies.gate else (copies.up, copies.up_bias)
    for i in range(quarter):
        near = i, min(i + quarter, last), min(i + 2 * quarter, last), min(i + 3 * quarter, last)
        n0, n1, n2, n3 = near
        at = start + n0, start + n1, start + n2, start + n3
        for t in range(tokens):
            v = one_input(inputs, t)
            gates = ups = _products(copies.like, first, copies.width, at, v, copies.d)
            if copies.gate:
                ups = _products(copies.like, copies.up, copies.width, at, v, copies.d)
            for n in range(4):
                z, u, neuron, k = gates[n], ups[n], at[n], near[n]
                if first_bias.shape[0]:
                    z += first_bias[neuron]
                score = activate(word, z)
                if copies.gate:
                    if copies.up_bias.shape[0]:
                        u += copies.up_bias[neuron]
                    score *= activate_up(word, u)
                passes = np.uint32(abs(score) * copies.lengths[neuron] >= threshold)
                masks[k] = passes if t == 0 else masks[k] | passes << np.uint32(t)
    count = 0
    for i in range(stop - start):  # from what passes to which do
        mask = masks[i]
        ids[count], masks[count] = start + i, mask
        count += mask != 0
    return count


@kernel
def _pass_tokens(worker, workers, copies, word, threshold, x, inputs, ids, masks, counts):  # type: ignore[no-untyped-def]
    """Whole tokens, one after another."""
    d, f, first, one, v = x.shape[1], copies.lengths.shape[0], np.int64(0), np.int64(1), one_input(inputs, 0)
    for t in range(worker, x.shape[0], workers):
        copy(x[t], d, v[0])
        prepare(copies.like, v, d)
        counts[t] = passing_rows(copies, first, f, inputs, one, word, threshold, ids[t], masks)


def passing_of_tokens(view: ProxyView, x: np.ndarray, pool: WorkerPool) -> tuple[np.ndarray, np.ndarray]:
    """The neurons that pass for each token of x [t, d] f32: ids int32, ascending, token after token, and offsets int64
    [t + 1]. Raises `ValueError` when shapes or types do not fit."""
    f, d = view.up.shape
    if x.shape[1:] != (d,) or x.dtype != np.float32:
        raise ValueError(f"passing_of_tokens wants f32 x of {d} columns, got {x.dtype} {x.shape}")
    inputs = Each(new_inputs(1, d) for _ in range(pool.threads))
    masks = Each(np.empty(f + 1, np.uint32) for _ in range(pool.threads))
    ids, counts = np.empty((len(x), f + 1), np.int32), np.zeros(len(x), np.int64)
    word, threshold = activation_word(view.activation), np.float32(view.threshold)
    given = view.copies(), word, threshold, np.ascontiguousarray(x), inputs, ids, masks, counts
    pool.run(_pass_tokens, pool.threads, *given)
    chosen = [ids[t, :count] for t, count in enumerate(counts)]
    return np.concatenate(chosen), np.concatenate(([0], counts.cumsum()))


def scores_ref(view: ProxyView, x: np.ndarray) -> np.ndarray:
    """The scores f32 [t, f] of x f32 [t, d], in NumPy and torch."""

    def product(matrix: Matrix, bias: np.ndarray | None) -> torch.Tensor:
        z = torch.from_numpy(x) @ matrix.widen().T
        return z if bias is None else z + torch.from_numpy(bias)

    up = product(view.up, view.up_bias)
    if view.gate is None:
        hidden = activate_ref(view.activation, up)
    else:
        hidden = activate_ref(view.activation, product(view.gate, view.gate_bias))
        hidden = hidden * activate_up_ref(view.activation, up)
    return (hidden.abs() * torch.from_numpy(view.lengths)).numpy()
