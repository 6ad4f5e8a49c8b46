"""Low-rank MLP predictor: which neurons are expected to fire for one token. Weights are int8 with a scale per row.

    hidden[k] = relu(s1[k] * (fc1[k] . x) + b1[k])
    fires(i)  where  s2[i] * (fc2[i] . hidden) + b2[i] >= threshold

Codes are padded with zeros to whole groups of 128 columns, and multiplied in integers (`inputs.py`). Rows are read
as four streams, as in `gemv.py`.

Threads: each worker takes a range of rows of each of the two products; ranges do not overlap. Ids are written per
range and copied together in order, so they come out ascending for any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels import barrier
from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.gemv import AHEAD
from cpu_kernels.inputs import copy, new_inputs, one_input, round_input
from cpu_kernels.row_dot import dot_codes
from cpu_kernels.worker_pool import Each, WorkerPool

_LIKE = np.empty((1, 128), np.int8)  # says how rows are stored
COUNT_STRIDE = 16  # int64 between the counts of two workers: a pair of cache lines


@dataclass(frozen=True, eq=False)
class PredictorView:
    """One layer's predictor as the kernels see it; all arrays C-contiguous, the codes may be memory-mapped.

    fc1: int8 [r, padded(d)] and fc2: int8 [f, padded(r)]; s1, b1: [r] and s2, b2: [f] f32. Raises `ValueError` for
    others, as kernels would read beyond them.
    """

    fc1: np.ndarray
    s1: np.ndarray
    b1: np.ndarray
    fc2: np.ndarray
    s2: np.ndarray
    b2: np.ndarray
    threshold: np.float32
    d: int

    def __post_init__(self) -> None:
        r, f = len(self.b1), len(self.b2)
        shapes = {"fc1": (r, padded(self.d)), "s1": (r,), "b1": (r,), "fc2": (f, padded(r)), "s2": (f,), "b2": (f,)}
        for name, shape in shapes.items():
            part, dtype = getattr(self, name), np.int8 if name.startswith("fc") else np.float32
            if part.shape != shape or part.dtype != dtype or not part.flags.c_contiguous:
                raise ValueError(f"predictor shapes do not fit: {name} is {part.dtype} {part.shape}, expected {shape}")

    @property
    def nbytes(self) -> int:
        """Bytes that predicting for one token reads."""
        return sum(part.nbytes for part in (self.fc1, self.s1, self.b1, self.fc2, self.s2, self.b2))

    @classmethod
    def of(
        cls,
        fc1: torch.Tensor,
        s1: torch.Tensor,
        b1: torch.Tensor,
        fc2: torch.Tensor,
        s2: torch.Tensor,
        b2: torch.Tensor,
        threshold: float,
    ) -> PredictorView:
        """From CPU tensors, of which the codes are padded. Raises `ValueError` when shapes do not fit."""
        if fc2.shape[1] != len(b1):  # which padding would hide
            raise ValueError(f"predictor shapes do not fit: fc2 {tuple(fc2.shape)} for {len(b1)} hidden units")
        v1, w1, v2, w2 = (tensor.float().contiguous().numpy() for tensor in (s1, b1, s2, b2))
        codes = pad_codes(fc1.numpy()), pad_codes(fc2.numpy())
        return cls(codes[0], v1, w1, codes[1], v2, w2, np.float32(threshold), fc1.shape[1])


def pad_codes(codes: np.ndarray) -> np.ndarray:
    """int8 [n, m] with zeros added to whole groups of columns; the same array where it has those."""
    missing = padded(codes.shape[1]) - codes.shape[1]
    return np.pad(codes, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(codes)


@subroutine(forceinline=True)
def _products(like, weight, width, i, quarter, stop, v, n):  # type: ignore[no-untyped-def]
    """Rows i, i + quarter, i + 2 quarter and i + 3 quarter of fc times v; beyond `stop` the last row again."""
    last = stop - 1
    r0, r1 = weight + i * width, weight + min(i + quarter, last) * width
    r2, r3 = weight + min(i + 2 * quarter, last) * width, weight + min(i + 3 * quarter, last) * width
    return dot_codes(like, (r0, r1, r2, r3), (r0 + AHEAD, r1 + AHEAD, r2 + AHEAD, r3 + AHEAD), v, n)


@subroutine
def hidden_units(like, fc1, width, start, stop, inputs, d, s1, b1, hidden):  # type: ignore[no-untyped-def]
    """hidden[t, start:stop] of the first product, for each token t; fc1 is an address, `inputs` of `d` elements are in
    their 16-bit form."""
    quarter = (stop - start + 3) // 4
    for i in range(start, start + quarter):
        for t in range(hidden.shape[0]):
            sums = _products(like, fc1, width, i, quarter, stop, one_input(inputs, t), d)
            for n in range(4):
                k = min(i + n * quarter, stop - 1)
                hidden[t, k] = max(sums[n] * s1[k] + b1[k], np.float32(0))


@subroutine
def firing_rows(  # type: ignore[no-untyped-def]
    like, fc2, width, start, stop, inputs, tokens, r, s2, b2, threshold, ids, masks
):  # fmt: skip
    """Write those of rows start to stop that are predicted to fire for some token to `ids`, and for which to `masks`
    uint32, bit t for token t; return how many there are."""
    quarter, last = (stop - start + 3) // 4, stop - start - 1
    for i in range(quarter):
        for t in range(tokens):
            sums = _products(like, fc2, width, start + i, quarter, stop, one_input(inputs, t), r)
            for n in range(4):
                k = min(i + n * quarter, last)
                fires = np.uint32(sums[n] * s2[start + k] + b2[start + k] >= threshold)
                masks[k] = fires if t == 0 else masks[k] | fires << np.uint32(t)
    return listed(start, stop, ids, masks)


@subroutine
def listed(start, stop, ids, masks):  # type: ignore[no-untyped-def]
    """Of masks[i] of rows start + i, those that are not 0 moved to the front, and their rows to `ids`; returns how many
    there are."""
    count = 0
    for i in range(stop - start):
        mask = masks[i]
        ids[count], masks[count] = start + i, mask
        count += mask != 0
    return count


@subroutine
def copy_together(worker, workers, counts, ids, rows):  # type: ignore[no-untyped-def]
    """Copy this worker's `ids` to its place among all in `rows`; returns how many all are."""
    total = first = 0
    for w in range(workers):
        if w == worker:
            first = total
        total += counts[w * COUNT_STRIDE]
    for k in range(counts[worker * COUNT_STRIDE]):
        rows[first + k] = ids[k]
    return total


@kernel
def _predict(  # type: ignore[no-untyped-def]
    worker, workers, state, like, fc1, s1, b1, width1, fc2, s2, b2, width2, threshold, x, inputs, hidden, ids, masks,
    counts, rows
):  # fmt: skip
    d, r, f, one = x.shape[0], b1.shape[0], b2.shape[0], np.int64(1)
    v = one_input(inputs, 0)
    copy(x, d, v[0])
    round_input(v, d)
    hidden_units(like, fc1, width1, r * worker // workers, r * (worker + 1) // workers, inputs, d, s1, b1, hidden)
    if not barrier.wait(state, workers):
        return
    copy(hidden[0], r, v[0])
    round_input(v, r)
    start, stop = f * worker // workers, f * (worker + 1) // workers
    counts[worker * COUNT_STRIDE] = firing_rows(
        like, fc2, width2, start, stop, inputs, one, r, s2, b2, threshold, ids[worker], masks[worker]
    )
    if barrier.wait(state, workers):
        counts[workers * COUNT_STRIDE] = copy_together(worker, workers, counts, ids[worker], rows)


def predict_rows(view: PredictorView, x: np.ndarray, rows: np.ndarray, pool: WorkerPool) -> int:
    """Write the ids of the neurons predicted to fire into `rows` int32 [f], ascending; return how many there are.

    x: [d] f32, the FFN's input. Raises `ValueError` when shapes or types do not fit.
    """
    f, r = len(view.b2), len(view.b1)
    if x.shape != (view.d,) or x.dtype != np.float32:
        raise ValueError(f"predict_rows wants f32 x of {view.d}, got {x.dtype} {x.shape}")
    if rows.shape != (f,) or rows.dtype != np.int32:
        raise ValueError(f"predict_rows wants int32 rows of {f}, got {rows.dtype} {rows.shape}")
    workers = pool.workers_for(view.fc1.nbytes + view.fc2.nbytes)
    inputs = Each(new_inputs(1, max(view.d, r)) for _ in range(workers))
    counts, ids = np.zeros((workers + 1) * COUNT_STRIDE, np.int64), np.empty((workers, f + 1), np.int32)
    first = (view.fc1.ctypes.data, view.s1, view.b1, view.fc1.shape[1])
    second = (view.fc2.ctypes.data, view.s2, view.b2, view.fc2.shape[1])
    scratch = (inputs, np.empty((1, r), np.float32), ids, np.empty((workers, f + 1), np.uint32), counts, rows)
    pool.run(_predict, workers, pool.barrier, _LIKE, *first, *second, view.threshold, x, *scratch)
    return int(counts[workers * COUNT_STRIDE])


@kernel
def _predict_tokens(  # type: ignore[no-untyped-def]
    worker, workers, like, fc1, s1, b1, width1, fc2, s2, b2, width2, threshold, x, inputs, hidden, ids, masks, counts
):  # fmt: skip
    """Whole tokens, one after another."""
    d, r, f, first, one = x.shape[1], b1.shape[0], b2.shape[0], np.int64(0), np.int64(1)
    v = one_input(inputs, 0)
    for t in range(worker, x.shape[0], workers):
        copy(x[t], d, v[0])
        round_input(v, d)
        hidden_units(like, fc1, width1, first, r, inputs, d, s1, b1, hidden)
        copy(hidden[0], r, v[0])
        round_input(v, r)
        counts[t] = firing_rows(like, fc2, width2, first, f, inputs, one, r, s2, b2, threshold, ids[t], masks)


def predict_tokens(view: PredictorView, x: np.ndarray, pool: WorkerPool) -> tuple[np.ndarray, np.ndarray]:
    """`predict_rows` of many tokens x [t, d] f32: their ids one after another, and offsets int64 [t + 1].

    Raises `ValueError` when shapes or types do not fit.
    """
    if x.shape[1:] != (view.d,) or x.dtype != np.float32:
        raise ValueError(f"predict_tokens wants f32 x of {view.d} columns, got {x.dtype} {x.shape}")
    f, r, workers = len(view.b2), len(view.b1), pool.threads
    inputs = Each(new_inputs(1, max(view.d, r)) for _ in range(workers))
    ids, counts = np.empty((len(x), f + 1), np.int32), np.zeros(len(x), np.int64)
    first = (view.fc1.ctypes.data, view.s1, view.b1, view.fc1.shape[1])
    second = (view.fc2.ctypes.data, view.s2, view.b2, view.fc2.shape[1])
    hidden = Each(np.empty((1, r), np.float32) for _ in range(workers))
    masks = Each(np.empty(f + 1, np.uint32) for _ in range(workers))
    pool.run(_predict_tokens, workers, _LIKE, *first, *second, view.threshold, x, inputs, hidden, ids, masks, counts)
    chosen = [ids[t, :count] for t, count in enumerate(counts)]
    return np.concatenate(chosen), np.concatenate(([0], counts.cumsum()))


def predict_rows_ref(view: PredictorView, x: np.ndarray, rows: np.ndarray, pool: WorkerPool | None) -> int:
    """`predict_rows` in NumPy."""
    hidden = np.maximum(view.fc1[:, : view.d].astype(np.float32) @ x * view.s1 + view.b1, 0)
    found = np.flatnonzero(view.fc2[:, : len(hidden)].astype(np.float32) @ hidden * view.s2 + view.b2 >= view.threshold)
    rows[: len(found)] = found
    return len(found)
