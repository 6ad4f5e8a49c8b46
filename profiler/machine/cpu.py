"""The CPU's part of `measure_hardware`: how fast its threads read host memory, meet, and multiply.

Threads: each pool that is measured is closed before the next one starts, also on Ctrl-C. Beside a GPU all cores but one
work, as the thread that waits for the GPU has that one.
"""

from __future__ import annotations

import platform
from contextlib import closing

import numpy as np

from cpu_kernels import bandwidth, barrier
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import Precision
from cpu_kernels.gemm import GemmScratch, gemm
from cpu_kernels.gemv import gemv
from cpu_kernels.matrix import Matrix
from cpu_kernels.sparse_ffn import FFNView, SparseFFNScratch, sparse_ffn
from cpu_kernels.worker_pool import WorkerPool
from profiler.common.hardware import PRODUCT_TOKENS, HardwareProfile
from profiler.machine.timing import WIDTH, Report, median_seconds

_NEURONS = 16384  # with three bf16 rows of `WIDTH` 403 MB, past the last-level cache
_FEW, _MANY = 16, 4  # a 16th and a 4th of the neurons: two sizes, as their difference holds no waking of threads
_GEMM_ROWS, _FEW_TOKENS = 4096, 32
_BARRIERS = 3  # of a layer's FFN: after gate and up, after down, after adding the parts
PROBE_BYTES = bandwidth.BUFFER_BYTES
_PROBE_SECONDS = 0.3
_ONE = 0x3C00  # a bf16 of 2^-7: no weight may be a denormal, which some processors multiply slowly


def measure_cpu(threads: int, report: Report) -> HardwareProfile:
    """The profile of the CPU with `threads` workers; it has no GPU."""
    weights = np.full((3 * _NEURONS, WIDTH), _ONE, np.uint16)
    rows = []
    for count in thread_counts(threads):
        report(f"host memory, {count} thread{'s' * (count > 1)}")
        with closing(WorkerPool(count)) as pool:
            rows.append((count, read_bandwidth(weights, pool), scattered_bandwidth(weights, pool)))
            layer = _BARRIERS * barrier_seconds(pool)
    report("host arithmetic")
    with closing(WorkerPool(threads)) as pool:
        precise, fast = gemm_flops(pool, "precise"), gemm_flops(pool, "fast")
        panels = panel_tokens(weights, pool, fast)
    _, read, scattered = rows[-1]
    return HardwareProfile(
        name=f"{platform.processor() or platform.machine() or 'CPU'}, CPU threads: {threads}",
        source="measured",
        cpu_threads=threads,
        cpu_read_bandwidth=read,
        cpu_scattered_bandwidth=scattered,
        cpu_layer_seconds=layer,
        cpu_gemm_flops=precise,
        cpu_fast_gemm_flops=fast,
        cpu_panel_tokens=panels,
        cpu_bandwidths=tuple(rows),
        gpu_read_bandwidth=0.0,
        pcie_bandwidth=0.0,
        handoff_seconds=0.0,
        gpu_launch_seconds=0.0,
        gpu_gemm_flops=0.0,
        vram_bytes=0,
    )


def thread_counts(threads: int) -> list[int]:
    """Powers of two below `threads`, and `threads`."""
    return [*(2**k for k in range(threads.bit_length()) if 2**k < threads), threads]


def read_bandwidth(weights: np.ndarray, pool: WorkerPool) -> float:
    """Bytes/s at which a GEMV reads `weights`, bf16 as uint16 [n, d]: the median pass."""
    matrix = Matrix(weights, weights.shape[1])
    x, out = np.ones((1, weights.shape[1]), np.float32), np.empty((1, len(weights)), np.float32)
    none = np.empty(0, np.float32)
    return matrix.nbytes / median_seconds(lambda _: gemv(matrix, x, none, out, pool))


def gemm_flops(pool: WorkerPool, precision: Precision) -> float:
    """Operations/s of a product of `PRODUCT_TOKENS` tokens with 4096 bf16 rows, as prompts have them."""
    rng = np.random.default_rng(0)
    words = rng.standard_normal((_GEMM_ROWS, WIDTH), np.float32).view(np.uint32) >> 16
    seconds = _gemm_seconds(Matrix(words.astype(np.uint16), WIDTH), PRODUCT_TOKENS, pool, precision)
    return 2.0 * PRODUCT_TOKENS * _GEMM_ROWS * WIDTH / seconds


def panel_tokens(weights: np.ndarray, pool: WorkerPool, fast: float) -> float:
    """Tokens whose `fast` products, `fast` operations/s of many tokens, take as long as panels of `weights`, bf16 as
    uint16 [n, d], more than caches hold: from how much longer each of a few tokens takes."""
    seconds = _gemm_seconds(Matrix(weights, weights.shape[1]), _FEW_TOKENS, pool, "fast")
    share = seconds * fast / (2.0 * PRODUCT_TOKENS * weights.size)  # of the time of many tokens with these weights
    share = min(share, 0.5)  # panels take as long as all those tokens at most
    return max(0.0, (PRODUCT_TOKENS * share - _FEW_TOKENS) / (1.0 - share))


def _gemm_seconds(matrix: Matrix, tokens: int, pool: WorkerPool, precision: Precision) -> float:
    rows, width = matrix.shape
    x, out = np.random.default_rng(1).standard_normal((tokens, width), np.float32), np.empty((tokens, rows), np.float32)
    none, scratch = np.empty(0, np.float32), GemmScratch(pool.threads, precision)
    return median_seconds(lambda _: gemm(matrix, x, none, out, pool, scratch))


def scattered_bandwidth(weights: np.ndarray, pool: WorkerPool) -> float:
    """Bytes/s at which the sparse FFN reads more active neurons, their gate, up and down rows, wherever they lie.

    weights: bf16 as uint16 [3 f, d]. Ids are drawn anew for each pass, so that no cache has their rows.
    """
    f, d = len(weights) // 3, weights.shape[1]
    gate, up, down = (Matrix(part, d) for part in weights.reshape(3, f, d))
    ffn = FFNView.of(gate, up, down, None, None, "relu")
    scratch, x, out = SparseFFNScratch(d, f, pool.threads), np.ones((1, d), np.float32), np.zeros((1, d), np.float32)
    rng, few, many = np.random.default_rng(0), f // _FEW, f // _MANY

    def seconds(active: int) -> float:
        draws = [np.sort(rng.choice(f, active, replace=False)).astype(np.int32) for _ in range(16)]
        ends = np.array([0, active], np.int64)
        return median_seconds(lambda turn: sparse_ffn(ffn, x, draws[turn % 16], ends, out, scratch, pool))

    short, long = seconds(few), seconds(many)
    # On a machine that others use a longer pass may come out shorter; then waking the threads is counted in.
    extra = (many - few) * ffn.row_bytes / (long - short) if long > short else 0.0
    whole = many * ffn.row_bytes / long
    return extra if whole < extra < 2 * whole else whole


@kernel
def _meet(worker, workers, state, times):  # type: ignore[no-untyped-def]
    for _ in range(times):
        if not barrier.wait(state, workers):
            return


def barrier_seconds(pool: WorkerPool, times: int = 1000) -> float:
    """Seconds that the workers of `pool` take to meet once when all are running."""
    few = median_seconds(lambda _: pool.run(_meet, pool.threads, pool.barrier, 1))
    many = median_seconds(lambda _: pool.run(_meet, pool.threads, pool.barrier, 1 + times))
    return max(0.0, many - few) / times


def probe_cpu() -> HardwareProfile:
    """Measure how fast all threads read host memory (about a second, 512 MiB), and nothing else; no GPU."""
    pool = WorkerPool()
    threads, found = pool.threads, bandwidth.read_bandwidth(pool, PROBE_BYTES, _PROBE_SECONDS)
    pool.close()
    return HardwareProfile(
        name=platform.processor() or platform.machine() or "CPU",
        source="measured",
        cpu_threads=threads,
        cpu_read_bandwidth=found,
        gpu_read_bandwidth=0.0,
        pcie_bandwidth=0.0,
        handoff_seconds=0.0,
        gpu_launch_seconds=0.0,
        cpu_layer_seconds=HardwareProfile.load().cpu_layer_seconds,
        vram_bytes=0,
    )
