"""What both halves of `measure_hardware` time with: the median of runs, and a product that both devices compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Report = Callable[[str], None]

WIDTH = 4096  # d of the models that do not fit a card
_SECONDS = 0.3  # for each figure
_GEMM_TOKENS, _GEMM_ROWS = 512, 2048


def gemm_flops(device: torch.device) -> float:
    """Floating-point operations/s of torch's f32 product of 512 tokens with 2048 rows, with torch's settings."""
    x = torch.ones(_GEMM_TOKENS, WIDTH, device=device)
    weight = torch.ones(_GEMM_ROWS, WIDTH, device=device)

    def product(_: int) -> None:
        torch.mm(x, weight.T)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2.0 * _GEMM_TOKENS * _GEMM_ROWS * WIDTH / median_seconds(product)


def median_seconds(work: Callable[[int], object], seconds: float | None = None) -> float:
    """The median of 3 or more runs of `work(number of the run)` in about `seconds`; one before them does not count."""
    work(0)
    times: list[float] = []
    began = time.perf_counter()
    limit = _SECONDS if seconds is None else seconds
    while len(times) < 3 or time.perf_counter() - began < limit:
        start = time.perf_counter()
        work(len(times))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
