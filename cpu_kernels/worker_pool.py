"""Threads that run a `nogil` kernel together.

Threads: `WorkerPool(n)` keeps n-1 daemon threads; the caller is worker 0 of every run. Workers block on their own queue
between runs and use no CPU. Only the caller may block on workers, and only inside `run`.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Below this many bytes read, waking another thread costs more than it saves: a wake-up and join takes 21 us on
# the 2-core machine, in which one core reads about 0.5 MB.
BYTES_PER_WORKER = 1 << 20
# A worker's notice can be lost to Ctrl-C between its arrival and our counting it; its result cannot, so we look again.
_WAIT_SECONDS = 0.05


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut by the cgroup's CPU quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    try:
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, max(1, math.ceil(int(limit) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, or none that we may read
    return count


def _send_home(jobs: list[queue.SimpleQueue[Any]]) -> None:
    for queued in jobs:
        queued.put(None)


class WorkerPool:
    """A fixed set of worker threads. `run` calls a function once per worker and returns when all are done."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads` counts the caller; None takes `available_cpus()`. Raises `ValueError` below 1."""
        self.threads = available_cpus() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"a worker pool needs at least 1 thread, got {threads}")
        self._jobs: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(self.threads - 1)]
        self._threads = [
            threading.Thread(target=self._serve, args=(jobs,), daemon=True, name=f"hybrid-cpu-{index + 1}")
            for index, jobs in enumerate(self._jobs)
        ]
        for thread in self._threads:
            thread.start()
        # A pool that is dropped without `close` must not leave its threads waiting for ever.
        weakref.finalize(self, _send_home, self._jobs)

    def workers_for(self, read_bytes: int) -> int:
        """How many workers are worth waking to read `read_bytes`."""
        return max(1, min(self.threads, read_bytes // BYTES_PER_WORKER))

    def run(self, kernel: Callable[..., Any], workers: int, *args: Any) -> None:
        """Call `kernel(worker, workers, *args)` on `workers` threads, the caller among them, and wait for all.

        Raises an exception that one of them raised, or Ctrl-C, after all have ended: they write the caller's arrays.
        """
        ended: list[BaseException | None] = []  # what counts: an interrupted `get` may lose its item, not this
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        failure: BaseException | None = None
        started = 0
        try:
            for index in range(1, workers):
                self._jobs[index - 1].put((kernel, index, workers, args, ended, done))
                started = index
            kernel(0, workers, *args)
        except BaseException as error:  # noqa: BLE001 - kept until the others have ended, then raised
            failure = error
        while len(ended) < started:
            try:
                with contextlib.suppress(queue.Empty):
                    done.get(timeout=_WAIT_SECONDS)
            except KeyboardInterrupt as error:
                failure = error
        failure = failure or next((error for error in ended if error is not None), None)
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the threads; a second call does nothing."""
        _send_home(self._jobs)
        for thread in self._threads:
            thread.join()
        self._jobs, self._threads = [], []
        self.threads = 1

    @staticmethod
    def _serve(jobs: queue.SimpleQueue[Any]) -> None:
        while (job := jobs.get()) is not None:
            kernel, index, workers, args, ended, done = job
            error: BaseException | None = None
            try:
                kernel(index, workers, *args)
            except BaseException as caught:  # noqa: BLE001 - handed to the caller
                error = caught
            ended.append(error)
            done.put(None)
            del job, kernel, args, ended, done, error  # an idle worker keeps nothing alive
