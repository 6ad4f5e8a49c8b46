"""Certificates: which neurons cannot fire is proved from copies of their rows in 8 bits; the others are named.

With q a deciding row's copy, s its scales, n the norms of x's blocks, slope and rest of `error_bound.py`, b the row's
bias, t the activation's threshold (FATReLU's, else 0):

    bound  =  slope * sum of s n  +  rest * |x|
    named  unless  q . x + b + bound <= t

A neuron that is not named has w . x + b <= t in f32 as `dense` and `exact` compute it, and so an activation of 0.

Proof. `bound` holds for the kernel's own sums in f32 (`error_bound.py`). Adding b and comparing: f32 rounds rising
numbers to rising ones, and t is one, so that w . x + b <= t in true numbers, w . x as f32 has it, is so in f32 too; the
three additions here lose at most 2^-21 (|q . x| + |b| + |t|) and a part of the bound's margin, and that much is added.
Norms of squares that are too small for f32 lose less than `_LEAST_NORM`, products and sums less than `_LEAST`. A bound
of `_MOST` and more, infinite or no number names its neuron: below it |w| |x| is at most 1.4e37, as rest has (d + 64) /
2^23 of |w|, and no sum of either kind overflows.

Threads: as in `low_rank.py`, whose place this takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpu_kernels.blocks import dequantize, padded
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import BLOCK, GROUP, LAYOUTS, split_activation
from cpu_kernels.gemv import AHEAD
from cpu_kernels.inputs import copy, new_inputs, one_input, round_input
from cpu_kernels.lanes import FAST_SUMS
from cpu_kernels.low_rank import listed
from cpu_kernels.row_dot import dot_with_scales
from cpu_kernels.worker_pool import Each, WorkerPool

_LIKE = np.empty((1, GROUP), np.int8)  # says how rows are stored
_LEAST, _LEAST_NORM, _MOST = np.float32(1e-30), np.float32(1e-18), np.float32(1e32)
_ADDED = np.float32(2.0**-21)
_HALF = BLOCK // 2


@dataclass(frozen=True, eq=False)
class CertificateView:
    """One layer's certificate as the kernels see it; arrays C-contiguous. Raises `ValueError` for others.

    rows: int8 rows in blocks [f, bytes of a row], whose scales are not below 0; slope, rest: f32 [f]; bias: of the
    deciding rows, f32 [f] or of length 0; activation: its name, d: the rows' weights.
    """

    rows: np.ndarray
    slope: np.ndarray
    rest: np.ndarray
    bias: np.ndarray
    activation: str
    d: int

    def __post_init__(self) -> None:
        f = len(self.rows)
        shapes = {"rows": (f, LAYOUTS["int8"].row_bytes(self.d)), "slope": (f,), "rest": (f,)}
        shapes |= {"bias": (f,)} if len(self.bias) else {}
        for name, shape in shapes.items():
            part, dtype = getattr(self, name), np.int8 if name == "rows" else np.float32
            if part.shape != shape or part.dtype != dtype or not part.flags.c_contiguous:
                raise ValueError(f"a certificate's {name} is {part.dtype} {part.shape}, expected {dtype} {shape}")

    @property
    def threshold(self) -> np.float32:
        """At and below which the activation is 0."""
        return np.float32(split_activation(self.activation)[1])

    @property
    def nbytes(self) -> int:
        """Bytes that naming one token's neurons reads."""
        return self.rows.nbytes + self.slope.nbytes + self.rest.nbytes


@subroutine(fastmath=FAST_SUMS)
def put_norms(v, d):  # type: ignore[no-untyped-def]
    """v[4][b] = n[b] of the input's f32 form, in the place that only rows of int4 use; returns |x|, all not below."""
    x, norms, total = v[0], v[4], np.float32(0)
    for b in range(padded(d) // BLOCK):
        length = _LEAST_NORM
        for start in range(BLOCK * b, BLOCK * b + BLOCK, _HALF):
            square = np.float32(0)
            for j in range(min(start, d), min(start + _HALF, d)):
                square += x[j] * x[j]
            length += np.sqrt(square)
            total += square
        norms[b] = length
    return np.sqrt(total) + np.float32(100) * _LEAST_NORM


@subroutine(forceinline=True)
def _is_named(z, scaled, slope, rest, length, bias, threshold):  # type: ignore[no-untyped-def]
    bound = slope * scaled + rest * length + _LEAST
    added = _ADDED * (abs(z) + abs(bias) + abs(threshold))
    return not (z + bias + bound + added <= threshold and bound < _MOST)


@subroutine
def named_rows(  # type: ignore[no-untyped-def]
    like, rows, width, start, stop, inputs, lengths, tokens, d, slope, rest, bias, threshold, ids, masks
):  # fmt: skip
    """Write those of rows start to stop that are named for some token to `ids`, and for which to `masks` uint32, bit t
    for token t; return how many there are. rows: an address; inputs: in their 16-bit form, with norms."""
    quarter, last = (stop - start + 3) // 4, stop - start - 1
    for i in range(quarter):
        k0, k1, k2, k3 = i, min(i + quarter, last), min(i + 2 * quarter, last), min(i + 3 * quarter, last)
        at = (
            rows + (start + k0) * width,
            rows + (start + k1) * width,
            rows + (start + k2) * width,
            rows + (start + k3) * width,
        )
        ahead = at[0] + AHEAD, at[1] + AHEAD, at[2] + AHEAD, at[3] + AHEAD
        for t in range(tokens):
            sums = dot_with_scales(like, at, ahead, one_input(inputs, t), d)
            for n in range(4):
                k = min(i + n * quarter, last)
                b = bias[start + k] if bias.shape[0] else np.float32(0)
                named = np.uint32(
                    _is_named(sums[n], sums[4 + n], slope[start + k], rest[start + k], lengths[t], b, threshold)
                )
                masks[k] = named if t == 0 else masks[k] | named << np.uint32(t)
    return listed(start, stop, ids, masks)


@kernel
def _name_tokens(  # type: ignore[no-untyped-def]
    worker, workers, like, rows, width, slope, rest, bias, threshold, x, inputs, lengths, ids, masks, counts
):  # fmt: skip
    """Whole tokens, one after another."""
    d, f, first, one = x.shape[1], slope.shape[0], np.int64(0), np.int64(1)
    v = one_input(inputs, 0)
    for t in range(worker, x.shape[0], workers):
        copy(x[t], d, v[0])
        round_input(v, d)
        lengths[0] = put_norms(v, d)
        counts[t] = named_rows(
            like, rows, width, first, f, inputs, lengths, one, d, slope, rest, bias, threshold, ids[t], masks
        )


def name_tokens(view: CertificateView, x: np.ndarray, pool: WorkerPool) -> tuple[np.ndarray, np.ndarray]:
    """The neurons that are named for each token of x [t, d] f32: int32 ids, rising, one token's after another's, and
    offsets int64 [t + 1]. Raises `ValueError` when shapes or types do not fit."""
    if x.shape[1:] != (view.d,) or x.dtype != np.float32:
        raise ValueError(f"name_tokens wants f32 x of {view.d} columns, got {x.dtype} {x.shape}")
    f, workers = len(view.rows), pool.threads
    inputs = Each(new_inputs(1, view.d) for _ in range(workers))
    lengths, masks = (
        Each(np.empty(n, dtype) for _ in range(workers)) for n, dtype in ((1, np.float32), (f + 1, np.uint32))
    )
    ids, counts = np.empty((len(x), f + 1), np.int32), np.zeros(len(x), np.int64)
    given = (view.rows.ctypes.data, view.rows.shape[1], view.slope, view.rest, view.bias, view.threshold)
    pool.run(_name_tokens, workers, _LIKE, *given, x, inputs, lengths, ids, masks, counts)
    chosen = [ids[t, :count] for t, count in enumerate(counts)]
    return np.concatenate(chosen), np.concatenate(([0], counts.cumsum()))


def name_tokens_ref(view: CertificateView, x: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """What `name_tokens` names, as bool [t, f], in f64; with bounds that are `slack` of themselves larger."""
    wide = np.zeros((len(x), view.rows.shape[1] // 34 * 32))
    wide[:, : view.d] = x
    codes = LAYOUTS["int8"].codes_bytes(view.d)
    scales = np.ascontiguousarray(view.rows[:, codes:]).view(np.float16).astype(np.float64)
    norms = np.linalg.norm(wide.reshape(len(x), -1, 2, _HALF), axis=3).sum(2)
    bound = (norms @ scales.T) * view.slope + np.linalg.norm(wide, axis=1)[:, None] * view.rest
    z = x.astype(np.float64) @ dequantize(view.rows, view.d).astype(np.float64).T
    z += view.bias if len(view.bias) else 0
    return np.asarray(z + (1 + slack) * bound > view.threshold)
