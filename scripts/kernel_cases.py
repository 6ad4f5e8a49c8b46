"""The cases of `bench_kernels.py`: what each kernel is run on, in torch beside it, and in its NumPy reference.

Weights are several times the last-level cache and taken in turn, so that each pass reads them from memory. GEMV
and sparse FFN run over many layers' worth of weights in one compiled call, as a decode step does. The
names under which kernels are called are gathered here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cpu_kernels import barrier
from cpu_kernels.attention import decode_attention, decode_attention_ref
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import activation_word
from cpu_kernels.ffn_phases import FFNWeights
from cpu_kernels.gemv import gemv_ref, gemv_shared
from cpu_kernels.inputs import copy, new_inputs, one_input
from cpu_kernels.low_rank import PredictorView, predict_rows, predict_rows_ref
from cpu_kernels.matrix import DType, Matrix
from cpu_kernels.norm import rms_norm, rms_norm_ref
from cpu_kernels.rope import QKNorm, rope, rope_ref
from cpu_kernels.row_dot import prepare
from cpu_kernels.sparse_ffn import FFNView, SparseFFNScratch, _together, sparse_ffn_ref
from cpu_kernels.top_k import top_k, top_k_ref
from cpu_kernels.worker_pool import Each, WorkerPool

NEURONS = {2048: 8192, 4096: 11008}  # of a layer; other widths have four times as many
HEAD_DIM = 128
_GEMV_BYTES = 32 * 2**20  # of a matrix, as large as a 7B model's
_TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_NO_BIAS = np.empty(0, np.float32)


@dataclass(frozen=True)
class Case:
    """One kernel on one input. A pass makes `calls` calls, which together must read `nbytes`.

    torch: the same pass in torch, or None. reference: a part of it in NumPy, that reads `reference_bytes`.
    from_memory: whether the bytes come from memory, so that a share of the read bandwidth has a meaning.
    """

    name: str
    nbytes: int
    calls: int
    run: Callable[[WorkerPool], object]
    torch: Callable[[], object] | None
    reference: Callable[[], object]
    reference_bytes: int
    from_memory: bool = True


@dataclass(frozen=True)
class Sizes:
    """total: bytes of a case's weights, which a pass goes through. workers: the most that a case will be run with."""

    total: int
    workers: int


def random_matrix(dtype: DType, n: int, d: int) -> Matrix:
    """Weights of `dtype` [n, d] with a standard deviation of 0.05; rows repeat after 1024, unseen by the speed."""
    drawn = torch.randn(min(n, 1024), d, generator=torch.Generator().manual_seed(0)).mul_(0.05)
    few = Matrix.of(drawn.to(_TORCH[dtype])) if dtype in _TORCH else Matrix.of(drawn, dtype)  # type: ignore[arg-type]
    return Matrix(np.resize(few.rows, (n, few.rows.shape[1])), d)


def as_torch(matrix: Matrix) -> torch.Tensor | None:
    """The same weights for torch, without a copy; None for blocks, which it does not know."""
    if matrix.dtype == "bf16":
        return torch.from_numpy(matrix.rows.view(np.int16)).view(torch.bfloat16)
    if matrix.dtype == "f16":
        return torch.from_numpy(matrix.rows.view(np.float16))
    return torch.from_numpy(matrix.rows) if matrix.dtype == "f32" else None


def _vector(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@kernel
def _many_matrices(worker, workers, state, like, table, width, x, own, bias, out):  # type: ignore[no-untyped-def]
    """`gemv` for one token over each matrix of `table`, int64 addresses, in one call as in a decode step."""
    d = x.shape[1]
    copy(x[0], d, own[0][0])
    prepare(like, one_input(own, 0), d)
    for n in range(table.shape[0]):
        gemv_shared(state, workers, like, table[n], width, out.shape[1], own, d, bias, out)
        if not barrier.wait(state, workers):
            return


def gemv_case(dtype: DType, d: int, sizes: Sizes) -> Case:
    """Dense rows, a few large matrices in turn."""
    one = random_matrix(dtype, 1, d).row_bytes
    rows = max(64, min(_GEMV_BYTES, sizes.total) // one)
    matrices = [random_matrix(dtype, rows, d) for _ in range(max(1, sizes.total // (rows * one)))]
    x, out = _vector(1, d), np.empty((1, rows), np.float32)
    part = Matrix(matrices[0].rows[:512], d)

    table = np.array([matrix.rows.ctypes.data for matrix in matrices])
    own = Each(new_inputs(1, d) for _ in range(sizes.workers))

    def run(pool: WorkerPool) -> None:
        first = matrices[0]
        given = (first.like, table, first.row_bytes, x, own, _NO_BIAS, out)
        pool.run(_many_matrices, pool.threads, pool.barrier, *given)

    views = [view for view in map(as_torch, matrices) if view is not None]
    inputs = [torch.from_numpy(x).to(view.dtype) for view in views]
    return Case(
        f"gemv {dtype} {d}",
        sum(matrix.nbytes for matrix in matrices),
        len(matrices),
        run,
        (lambda: [F.linear(v, w) for v, w in zip(inputs, views, strict=True)]) if views else None,
        lambda: gemv_ref(part, x, _NO_BIAS, np.empty((1, len(part.rows)), np.float32), None),
        part.nbytes,
    )


@kernel
def _many_layers(  # type: ignore[no-untyped-def]
    worker, workers, state, first, table, code, x, rows, starts, ones, parts, inputs, hidden, places, own, sums,
    offsets, out, fired
):  # fmt: skip
    """`sparse_ffn` for one token over each layer of `table`, int64 [layers, 3] of addresses of gate, up and down.

    first: the weights of one of them, whose type and sizes all share.
    """
    skip = np.bool_(False)  # plain False is a type of its own
    for n in range(table.shape[0]):
        ids = rows[starts[n] : starts[n + 1]]
        count = ids.shape[0]
        gate, up, down = table[n, 0], table[n, 1], table[n, 2]
        ffn = FFNWeights(first.like, gate, up, down, first.width, first.d, first.gate_bias, first.up_bias)
        activations = hidden[:count].reshape(1, count)
        _together(
            worker, workers, state, ffn, code, skip, x, ids, ones[:count], parts, inputs, activations, places, own,
            sums, offsets, out, fired
        )  # fmt: skip
        if not barrier.wait(state, workers):  # the next layer overwrites `hidden`
            return


class SparseLayers:
    """Layers of gated neurons, of which a share is computed, drawn anew for every layer of a pass."""

    def __init__(self, dtype: DType, d: int, share: float, sizes: Sizes) -> None:
        self.f = f = NEURONS.get(d, 4 * d)
        row_bytes = 3 * random_matrix(dtype, 1, d).row_bytes
        self.views = [
            FFNView.of(*(random_matrix(dtype, f, d) for _ in range(3)), None, None, "relu")
            for _ in range(max(1, sizes.total // (f * row_bytes)))
        ]
        self.active = max(1, round(share * f))
        steps = max(len(self.views), sizes.total // (self.active * row_bytes))
        self.order = [self.views[number % len(self.views)] for number in range(steps)]
        self.nbytes = steps * self.active * row_bytes
        rng = np.random.default_rng(0)
        picked = [np.sort(rng.choice(f, self.active, replace=False)) for _ in range(2 * steps)]
        self.rows = itertools.cycle(np.concatenate(half).astype(np.int32) for half in (picked[:steps], picked[steps:]))
        self.starts = np.arange(steps + 1, dtype=np.int64) * self.active
        self.table = np.array([(view.weights.gate, view.weights.up, view.weights.down) for view in self.order])
        self.x, self.out = _vector(1, d), np.zeros((1, d), np.float32)
        self._scratch = SparseFFNScratch(d, f, sizes.workers)

    def run(self, pool: WorkerPool) -> None:
        """All layers of a pass in one call."""
        s, code = self._scratch, activation_word("relu")
        given = (self.views[0].weights, self.table, code, self.x, next(self.rows), self.starts, s.ones, s.parts)
        own = (s.inputs, s.hidden, s.places, s.owns, *s.sums(s.parts))
        pool.run(_many_layers, pool.threads, pool.barrier, *given, *own, self.out, s.fired)

    def in_torch(self) -> Callable[[], object] | None:
        parts = [[as_torch(matrix) for matrix in (view.gate, view.up, view.down) if matrix] for view in self.views]
        if parts[0][0] is None:
            return None
        x = torch.from_numpy(self.x).to(parts[0][0].dtype)

        def run() -> None:
            ids = torch.from_numpy(next(self.rows)).split(self.active)
            for number, mine in enumerate(ids):
                gate, up, down = parts[number % len(parts)]
                (x @ gate[mine].T).relu_().mul_(x @ up[mine].T) @ down[mine]

        return run


def sparse_case(dtype: DType, d: int, share: float, sizes: Sizes) -> Case:
    """Scattered rows of gate, up and down."""
    layers = SparseLayers(dtype, d, share, sizes)
    few, ends = next(layers.rows)[: min(64, layers.active)], np.array([0, min(64, layers.active)])
    return Case(
        f"sparse_ffn {dtype} {d} {share:.0%}",
        layers.nbytes,
        len(layers.order),
        layers.run,
        layers.in_torch(),
        lambda: sparse_ffn_ref(layers.views[0], layers.x, few, ends, np.zeros_like(layers.x)),
        few.size * layers.views[0].row_bytes,
    )


def predictor_case(d: int, sizes: Sizes) -> Case:
    """int8 predictors of rank d / 8, a layer's at a time."""
    r, f = d // 8, NEURONS.get(d, 4 * d)
    generator = torch.Generator().manual_seed(0)

    def codes(n: int, m: int) -> torch.Tensor:
        return torch.randint(-127, 128, (n, m), generator=generator, dtype=torch.int8)

    def vector(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator) * 0.01

    def view() -> PredictorView:
        return PredictorView.of(codes(r, d), vector(r), vector(r), codes(f, r), vector(f), vector(f), 1.0)

    first = view()
    views = [first, *(view() for _ in range(sizes.total // first.nbytes))]
    x, rows = _vector(d), np.empty(f, np.int32)

    def run(pool: WorkerPool) -> None:
        for each in views:
            predict_rows(each, x, rows, pool)

    reference = lambda: predict_rows_ref(first, x, rows, None)  # noqa: E731
    nbytes = sum(each.nbytes for each in views)
    return Case(f"predictor int8 {d}", nbytes, len(views), run, None, reference, first.nbytes)


def attention_case(d: int, length: int, sizes: Sizes) -> Case:
    """One query per head over `length` positions, a layer's cache at a time, in blocks of 256."""
    heads, block = max(1, d // HEAD_DIM), min(256, length)
    shape = (-(-length // block), 2, heads, block, HEAD_DIM)
    one = 2 * length * heads * HEAD_DIM * 4
    caches = [_vector(*shape) for _ in range(max(1, sizes.total // one))]
    q, out = _vector(heads, HEAD_DIM), np.empty((heads, HEAD_DIM), np.float32)
    table = np.arange(shape[0], dtype=np.int32)
    flat = [torch.from_numpy(_vector(2, 1, heads, length, HEAD_DIM)) for _ in caches]
    query = torch.from_numpy(q)[None, :, None]

    def run(pool: WorkerPool) -> None:
        for cache in caches:
            decode_attention(q, cache, table, length, None, out, pool)

    return Case(
        f"attention f32 {d}, {length} positions",
        one * len(caches),
        len(caches),
        run,
        lambda: [F.scaled_dot_product_attention(query, keys, values) for keys, values in flat],
        lambda: decode_attention_ref(q, caches[0], table, length, None, out, None),
        one,
    )


def small_cases(d: int, vocab: int = 32000, calls: int = 200) -> Iterator[Case]:
    """What works in the caches: times a call are what counts."""
    x, weight, out = _vector(1, d), _vector(d), np.empty((1, d), np.float32)
    heads = max(1, d // HEAD_DIM)
    qkv, cache = _vector(3 * heads, HEAD_DIM), np.zeros((1, 2, heads, 256, HEAD_DIM), np.float32)
    rotation, no_norm = (_vector(HEAD_DIM // 2), _vector(HEAD_DIM // 2)), QKNorm(_NO_BIAS, _NO_BIAS, 1e-5)
    table, logits = np.zeros(1, np.int32), _vector(vocab)
    tx, tw, tl = map(torch.from_numpy, (x, weight, logits))

    def repeated(work: Callable[..., Any], *args: Any) -> Callable[..., None]:
        return lambda *pool: [work(*args, *pool) for _ in range(calls)] and None

    for name, one, work, args, in_torch, reference in (
        ("rms_norm", 12 * d, rms_norm, (x, weight, 1e-5, out), lambda: F.rms_norm(tx, (d,), tw, 1e-5), rms_norm_ref),
        ("rope", 2 * qkv.nbytes, rope, (qkv, rotation, no_norm, cache, table, 5), None, rope_ref),
        ("top_k 40", logits.nbytes, top_k, (logits, 40), lambda: torch.topk(tl, 40), top_k_ref),
    ):
        yield Case(
            f"{name} {vocab if name.startswith('top_k') else d}",
            calls * one,
            calls,
            repeated(work, *args),
            repeated(in_torch) if in_torch else None,
            lambda reference=reference, args=args: reference(*args, None),
            one,
            from_memory=False,
        )


def all_cases(quick: bool, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names of all cases with what makes them, so that one case's weights are in memory at a time."""
    widths: tuple[int, ...] = (2048,) if quick else (2048, 4096)
    dtypes: tuple[DType, ...] = ("bf16", "int8", "int4") if quick else ("bf16", "f16", "f32", "int8", "int4")
    for d in widths:
        for dtype in dtypes:
            yield f"gemv {dtype} {d}", lambda dtype=dtype, d=d: gemv_case(dtype, d, sizes)
        for dtype, share in itertools.product(dtypes, (0.1, 0.01)):
            name = f"sparse_ffn {dtype} {d} {share:.0%}"
            yield name, lambda dtype=dtype, d=d, share=share: sparse_case(dtype, d, share, sizes)
        yield f"predictor int8 {d}", lambda d=d: predictor_case(d, sizes)
        for length in (128, 2048):
            name = f"attention f32 {d}, {length} positions"
            yield name, lambda d=d, length=length: attention_case(d, length, sizes)
        for number, name in enumerate(("rms_norm", "rope", "top_k")):
            yield f"{name} {d}", lambda d=d, number=number: next(itertools.islice(small_cases(d), number, None))
