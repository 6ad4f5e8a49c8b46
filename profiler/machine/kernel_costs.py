"""What the GPU's kernels take inside a CUDA graph, at a few sizes: the points of `HardwareProfile.gpu_kernels`.

A graph holds many launches of one kernel, each on other weights, so that the L2 cache has none of them when they come,
as in a decode step, between two of which all weights of the model are read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from gpu_kernels.attention import attention_scratch, attention_splits, decode_attention
from gpu_kernels.gemv import gemv
from gpu_kernels.low_rank import DevicePredictorView, predict
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.norm import residual_norm
from gpu_kernels.sparse_ffn import DeviceFFNView, down_parts, sparse_ffn

Launch = Callable[[], None]

_REPLAYS = 20
_MOST_LAUNCHES = 256  # of a graph
_SMALL_LAUNCHES = 64


class Case(NamedTuple):
    """One size of a kernel: the bytes that a launch reads, and launches that read other ones each."""

    size: int
    launches: Sequence[Launch]


class Shape(NamedTuple):
    """Sizes to measure at; those of a model with 7 billion weights."""

    d: int = 4096
    gemv_rows: tuple[int, ...] = (1024, 4096, 12288, 32768)
    weight_rows: int = 65536  # 512 MiB in bf16: ten times the L2 cache of an H100
    heads: int = 32
    contexts: tuple[int, ...] = (256, 1024, 4096)
    cached_tokens: int = 16384
    block: int = 256
    neurons: int = 11008
    ranks: tuple[int, ...] = (128, 512, 1024)
    predictor_bytes: int = 2**28  # of all predictors of a rank together
    active: tuple[int, ...] = (64, 256, 1024, 4096)


def graph_seconds(launches: Sequence[Launch]) -> float:
    """Seconds of one of `launches` inside a CUDA graph of all of them: the median of 20 replays."""
    graph = _capture(launches)
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / len(launches)


def seconds_after_small(launches: Sequence[Launch], small: Launch) -> float:
    """Seconds of one of `launches` and of a small one before it, as in a step: each waits for what the other wrote."""
    return 2 * graph_seconds([each for launch in launches for each in (small, launch)])


def replay_seconds(launches: Sequence[Launch]) -> float:
    """Seconds that a replay of a graph of `launches` takes on the host's clock beside its kernels on the GPU's."""
    graph = _capture(launches)
    times = []
    for _ in range(_REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return max(0.0, statistics.median(times[1:]) - len(launches) * graph_seconds(launches))


def _capture(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    for launch in launches:  # outside of the graph first, as capture may not compile or load code
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def kernel_points(
    cases: Iterator[Case], seconds: Callable[[Sequence[Launch]], float]
) -> tuple[tuple[float, float], ...]:
    """(bytes, seconds) of each case, by rising size; a larger one never takes less, whatever the noise says."""
    points: list[tuple[float, float]] = []
    for case in cases:
        took = seconds(case.launches)
        points.append((float(case.size), max([took, *(earlier for _, earlier in points)])))
    return tuple(points)


SHAPE = Shape()


def all_cases(device: torch.device, shape: Shape = SHAPE) -> Iterator[tuple[str, Iterator[Case]]]:
    """The cases of each kernel of `GPU_KERNELS`, one kernel's tensors at a time."""
    yield "gemv", gemv_cases(device, shape)
    yield "attention", attention_cases(device, shape)
    yield "predictor", predictor_cases(device, shape)
    yield "sparse_ffn", sparse_ffn_cases(device, shape)


def small_launches(device: torch.device, shape: Shape = SHAPE) -> list[Launch]:
    """Norms of one token: what the many small kernels of a step are like."""
    x, weight = torch.ones(1, shape.d, device=device), torch.ones(shape.d, device=device)
    out = torch.empty_like(x)
    return [partial(residual_norm, x, weight, None, 1e-5, out)] * _SMALL_LAUNCHES


def gemv_cases(device: torch.device, shape: Shape = SHAPE) -> Iterator[Case]:
    """Products of one token with the rows of bf16 matrices."""
    weights = torch.full((shape.weight_rows, shape.d), 1 / 128, dtype=torch.bfloat16, device=device)
    x = torch.ones(1, shape.d, device=device)
    for rows in shape.gemv_rows:
        out = torch.empty(1, rows, device=device)
        matrices = [DeviceMatrix(part, shape.d, "bf16") for part in _parts(weights, rows)]
        yield Case(matrices[0].nbytes, [partial(gemv, matrix, x, None, out) for matrix in matrices])


def attention_cases(device: torch.device, shape: Shape) -> Iterator[Case]:
    """One token over contexts of several lengths, keys and values f16."""
    width, blocks = shape.d // shape.heads, shape.cached_tokens // shape.block
    cache = torch.ones(blocks, 2, shape.heads, shape.block, width, dtype=torch.float16, device=device)
    q, out = torch.ones(1, shape.heads, width, device=device), torch.empty(1, shape.d, device=device)
    splits = attention_splits(shape.heads, max(shape.contexts))
    scratch = attention_scratch(1, shape.heads, width, splits, device)
    for context in shape.contexts:
        position = torch.tensor([context - 1], dtype=torch.int32, device=device)
        ids = torch.arange(blocks, dtype=torch.int32, device=device)
        tables = [part[None] for part in _parts(ids, -(-context // shape.block))]
        launches = [partial(decode_attention, q, cache, table, position, None, out, scratch) for table in tables]
        yield Case(2 * context * shape.d * cache.itemsize, launches)


def predictor_cases(device: torch.device, shape: Shape) -> Iterator[Case]:
    """Predictors of several ranks for one token."""
    x, masks = torch.ones(1, shape.d, device=device), torch.empty(shape.neurons, dtype=torch.int32, device=device)
    for rank in shape.ranks:
        hidden = torch.empty(1, rank, device=device)
        first = _predictor(device, shape, rank)
        count = max(1, min(_MOST_LAUNCHES, shape.predictor_bytes // first.nbytes))
        views = [first, *(_predictor(device, shape, rank) for _ in range(count - 1))]
        yield Case(first.nbytes, [partial(predict, view, x, hidden, masks) for view in views])


def _predictor(device: torch.device, shape: Shape, rank: int) -> DevicePredictorView:
    def codes(rows: int, columns: int) -> torch.Tensor:
        return torch.ones(rows, columns, dtype=torch.int8, device=device)

    def vector(size: int) -> torch.Tensor:
        return torch.ones(size, device=device)

    first = codes(rank, shape.d), vector(rank), vector(rank)
    return DevicePredictorView.of(
        *first, codes(shape.neurons, rank), vector(shape.neurons), vector(shape.neurons), 0.0, device
    )


def sparse_ffn_cases(device: torch.device, shape: Shape) -> Iterator[Case]:
    """One token over active bf16 neurons here and there, all of which fire: gate, up and down are read."""
    rows = torch.full((3, shape.neurons, shape.d), 1 / 128, dtype=torch.bfloat16, device=device)
    gate, up, down = (DeviceMatrix(part, shape.d, "bf16") for part in rows)
    ffn = DeviceFFNView(gate, up, down, None, None, "relu")
    x, parts = torch.ones(1, shape.d, device=device), torch.empty(down_parts(shape.d), 1, shape.d, device=device)
    order = torch.randperm(shape.neurons, generator=torch.Generator().manual_seed(0)).int()
    for active in shape.active:
        count = torch.tensor([active], dtype=torch.int32, device=device)
        hidden = torch.empty(1, active, device=device)
        chosen = [part.sort().values.to(device) for part in _parts(order, active)]
        launches = [partial(sparse_ffn, ffn, x, ids, count, None, hidden, parts) for ids in chosen]
        yield Case(3 * active * shape.d * rows.itemsize, launches)


def _parts(tensor: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Disjoint slices of `size` rows, as many as fit and a graph takes."""
    return [part for part in tensor.split(size) if len(part) == size][:_MOST_LAUNCHES]
