"""What both halves of `measure_hardware` time with: the median of runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Report = Callable[[str], None]

WIDTH = 4096  # d of the models that do not fit a card
_SECONDS = 0.3  # for each figure


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
