"""Threads that turn blocks of weights into their run-time type, a few blocks ahead of who writes them, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cpu_kernels.worker_pool import available_cpus

MOST_CODERS = 8
T = TypeVar("T")


def coders() -> ThreadPoolExecutor:
    """One thread for each CPU, at most `MOST_CODERS`."""
    return ThreadPoolExecutor(min(MOST_CODERS, available_cpus()))


def in_order(tasks: Iterable[Callable[[], T]], threads: ThreadPoolExecutor) -> Iterator[T]:
    """Results of tasks in their order, made by `threads` a few ahead."""
    waiting: deque[Future[T]] = deque()
    ahead = min(MOST_CODERS, available_cpus())
    try:
        for task in tasks:
            waiting.append(threads.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after an error or Ctrl-C, what is not begun need not be
        for future in waiting:
            future.cancel()
