"""How fast this machine's threads read memory: the ceiling that every kernel is held against.

All workers read disjoint ranges of one buffer, several times the last-level cache, with 64-byte loads whose only use is
a sum, and fetch lines some way ahead. A worker reads its range from one place or from four at once; which is faster
depends on the machine and on how many read, so both are tried and the faster counts.

Measured on 2 cores of an EPYC 9004, medians in GB/s (one thread / two): one stream 31 / 51, four streams 28 / 62, two
23 / 60; fetching 1 KiB ahead is as good as 512 B or 2 KiB and up to 10% better than none, 4 KiB is worse. Other times
all variants read the same 34 to 37, when the memory was the limit. A scalar loop reads 5: Numba does not vectorise it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import I32, I64, Code
from cpu_kernels.worker_pool import WorkerPool

# Past the last-level cache of any server CPU on sale, small enough to be read several times in a second.
BUFFER_BYTES = 512 * 2**20
_BLOCK, _AHEAD = 256, 1024  # bytes of one step of a stream, and how far ahead of it lines are fetched
_LANES = 8  # of 64 bits: a cache line


def _add_step(code: Code, starts: list[Any], offset: Any, sums: list[Any]) -> None:
    """One step of every stream: four cache lines, each added to a sum of its own."""
    builder = code.builder
    for start in starts:
        at = builder.add(start, offset)
        for line, total in enumerate(sums):
            code.fetch(builder.add(at, I64(_AHEAD + 64 * line)))
            builder.store(builder.add(builder.load(total), code.load(at, I64, _LANES, 64 * line, 8)), total)


@intrinsic
def _sum_streams(typing_context: Any, starts: Any, steps: Any) -> Any:
    """Sum of the int64 in `steps` blocks from each address in the tuple `starts`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        streams = [builder.extract_value(args[0], number) for number in range(len(starts))]
        zero = ir.Constant(ir.VectorType(I64, _LANES), [0] * _LANES)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(_BLOCK // 64)]
        with cgutils.for_range(builder, args[1], intp=I64) as loop:
            _add_step(code, streams, builder.mul(loop.index, I64(_BLOCK)), sums)
        first, *others = (builder.extract_element(builder.load(s), I32(n)) for s in sums for n in range(_LANES))
        for other in others:
            first = builder.add(first, other)
        return first

    return types.int64(starts, types.int64), generate


@kernel
def _one_stream(worker, workers, address, blocks, sums):  # type: ignore[no-untyped-def]
    first, last = blocks * worker // workers, blocks * (worker + 1) // workers
    sums[worker] = _sum_streams((address + _BLOCK * first,), last - first)


@kernel
def _four_streams(worker, workers, address, blocks, sums):  # type: ignore[no-untyped-def]
    first, last = blocks * worker // workers, blocks * (worker + 1) // workers
    start, steps = address + _BLOCK * first, (last - first) // 4
    stride = _BLOCK * steps
    sums[worker] = _sum_streams((start, start + stride, start + 2 * stride, start + 3 * stride), steps)
    rest = start + 4 * stride
    sums[worker] += _sum_streams((rest,), last - first - 4 * steps)


class BandwidthProbe:
    """A buffer that is read again and again, so that the ceiling can be measured between the runs held against it."""

    def __init__(self, pool: WorkerPool, size: int = BUFFER_BYTES) -> None:
        """size: bytes of the buffer, cut to whole blocks of 256. Raises `ValueError` below one block a worker."""
        if size < _BLOCK * pool.threads:
            raise ValueError(f"a bandwidth probe needs at least {_BLOCK * pool.threads} bytes, got {size}")
        self._pool = pool
        self.cores = 0.0
        self._buffer = np.ones(size // _BLOCK * (_BLOCK // 8), np.int64)  # written, or all pages were one page of zeros
        self._sums = np.zeros(pool.threads, np.int64)
        for reader in (_one_stream, _four_streams):
            self._pass(reader)
            if self._sums.sum() != self._buffer.size:
                raise RuntimeError(f"the bandwidth probe read {self._sums.sum()} of {self._buffer.size} words")

    def measure(self, seconds: float = 0.3) -> float:
        """Bytes per second: the median pass of the faster reader. Takes about `seconds`, at least two passes.

        `cores` is then how many cores this process had meanwhile: well below the pool's threads, others used them.
        """
        times: dict[Any, list[float]] = {_one_stream: [], _four_streams: []}
        start, busy = time.perf_counter(), time.process_time()
        while True:
            for reader, passes in times.items():
                passes.append(self._pass(reader))
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                self.cores = (time.process_time() - busy) / elapsed
                return self._buffer.nbytes / min(map(statistics.median, times.values()))

    def _pass(self, reader: Callable[..., None]) -> float:
        start = time.perf_counter()
        blocks = self._buffer.nbytes // _BLOCK
        self._pool.run(reader, self._pool.threads, self._buffer.ctypes.data, blocks, self._sums)
        return time.perf_counter() - start


def read_bandwidth(pool: WorkerPool, size: int = BUFFER_BYTES, seconds: float = 0.3) -> float:
    """Bytes per second that all threads of `pool` read together from a buffer of `size` bytes."""
    return BandwidthProbe(pool, size).measure(seconds)
