"""Threads that run a `nogil` kernel together.

Threads: `WorkerPool(n)` keeps n daemon threads, none for n = 1; a run of one worker is the caller's own. Workers block
on their own queue between runs and use no CPU. Only the caller may block on workers, and only inside `run`; a second
caller waits for the first one's end. A child of `fork` has none of its parent's threads: its first run starts new ones.

CPUs: where a pool takes every core that this process may use, each worker is pinned to a CPU of its own. With cores
left over the system places threads better, as it knows what else runs. The caller's thread is never pinned, since
threads that it starts would inherit that, and is no worker: one that was shared a pinned worker's CPU in 43 of 50 runs,
until the system moved it some milliseconds later.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from cpu_kernels.barrier import abort, new_barrier, reset
from cpu_kernels.cpus import allowed_cpus, available_cpus, cores_of, pinned_threads, spread

__all__ = ["BYTES_PER_WORKER", "WorkerPool", "available_cpus"]

# Below this many bytes read, waking another thread costs more than it saves: a wake-up and join takes 21 us on
# the 2-core machine, in which one core reads about 0.5 MB.
BYTES_PER_WORKER = 1 << 20
# A worker's notice can be lost to Ctrl-C between its arrival and our counting it; its result cannot, so we look again.
_WAIT_SECONDS = 0.05


def _send_home(jobs: list[queue.SimpleQueue[Any]]) -> None:
    for queued in jobs:
        queued.put(None)


class Each(tuple[Any, ...]):
    """An argument of `WorkerPool.run` with one value for each worker, which gets only its own."""


def worker_cpus(threads: int) -> list[int | None]:
    """The CPU to pin each of `threads` to; None for a thread that goes where the system puts it."""
    cpus = allowed_cpus()
    cores = cores_of(cpus)
    if not len(cores) <= threads <= len(cpus) or available_cpus() < len(cpus):
        return [None] * threads
    return list(spread(cores, pinned_threads())[:threads])


class WorkerPool:
    """A fixed set of worker threads. `run` calls a function once per worker and returns when all are done.

    Kernels of a run may wait for each other on `barrier`.
    """

    def __init__(self, threads: int | None = None) -> None:
        """None takes `available_cpus()`. Raises `ValueError` below 1."""
        self.threads = available_cpus() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"a worker pool needs at least 1 thread, got {threads}")
        self.barrier = new_barrier()
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._in_use, self._caller = threading.Lock(), 0
        self._unsettled = False  # whether the last run failed, after which a worker may still be in it
        self._jobs: list[queue.SimpleQueue[Any]] = [
            queue.SimpleQueue() for _ in range(self.threads if self.threads > 1 else 0)
        ]
        self._threads = [
            threading.Thread(target=_serve, args=(jobs, cpu), daemon=True, name=f"hybrid-cpu-{index}")
            for index, (jobs, cpu) in enumerate(zip(self._jobs, worker_cpus(self.threads), strict=False))
        ]
        # A pool that is dropped without `close` must not leave its threads waiting for ever.
        weakref.finalize(self, _send_home, self._jobs)
        for thread in self._threads:
            thread.start()

    def workers_for(self, read_bytes: int) -> int:
        """How many workers are worth waking to read `read_bytes`."""
        return max(1, min(self.threads, read_bytes // BYTES_PER_WORKER))

    def run(self, kernel: Callable[..., Any], workers: int, *args: Any) -> None:
        """Call `kernel(worker, workers, *args)` on `workers` threads, or on the caller's for one, and wait for all.

        Of an argument that is an `Each` a worker gets its own element: unpacking all workers' buffers in all of 16
        workers, one after another as it needs the GIL, took 2 ms a call.

        Raises an exception that one of them raised, or Ctrl-C, after all have ended: they write the caller's arrays.
        Those that wait on the barrier are sent home then. Raises `ValueError` for more workers than threads and
        `RuntimeError` where a kernel calls it.
        """
        if not 1 <= workers <= self.threads:
            raise ValueError(f"{workers} workers asked of a pool of {self.threads} threads")
        if self._process != os.getpid():
            self._start()
        with self._claimed():
            if self._unsettled:
                self._settle()
            reset(self.barrier)
            self._unsettled = True
            self._run(kernel, workers, args)
            self._unsettled = False

    def _settle(self) -> None:
        """Wait for what Ctrl-C, more than once, may have left running: jobs queue, so the last one ends last."""
        abort(self.barrier)
        ended: list[BaseException | None] = []
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        for jobs in self._jobs:
            jobs.put((_do_nothing, 0, 0, (), self.barrier, ended, done))
        while len(ended) < len(self._jobs):
            with contextlib.suppress(queue.Empty):
                done.get(timeout=_WAIT_SECONDS)

    def _run(self, kernel: Callable[..., Any], workers: int, args: tuple[Any, ...]) -> None:
        if workers == 1:
            kernel(0, 1, *_own(args, 0))
            return
        ended: list[BaseException | None] = []  # what counts: an interrupted `get` may lose its item, not this
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        failure: BaseException | None = None
        started = 0
        try:
            for index in range(workers):
                self._jobs[index].put((kernel, index, workers, _own(args, index), self.barrier, ended, done))
                started = index + 1
        except BaseException as error:  # noqa: BLE001 - kept until the others have ended, then raised
            abort(self.barrier)
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

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Only one thread runs or closes the pool at a time; a kernel that tried would wait for its own end."""
        own = self._in_use.locked() and self._caller == threading.get_ident()
        if own or threading.current_thread() in self._threads:
            raise RuntimeError("a kernel may neither run nor close the worker pool that it runs on")
        with self._in_use:
            self._caller = threading.get_ident()
            yield

    def close(self) -> None:
        """End the threads, after a run that another thread is in; a second call does nothing."""
        if self._process != os.getpid():
            self._jobs, self._threads = [], []  # they stayed in the parent
            self.threads = 1
            return
        with self._claimed():
            if self._unsettled:
                abort(self.barrier)
            _send_home(self._jobs)
            for thread in self._threads:
                thread.join()
            self._jobs, self._threads = [], []
            self.threads = 1


def _own(args: tuple[Any, ...], worker: int) -> tuple[Any, ...]:
    return tuple(arg[worker] if isinstance(arg, Each) else arg for arg in args)


def _do_nothing(worker: int, workers: int) -> None:
    pass


def _serve(jobs: queue.SimpleQueue[Any], cpu: int | None) -> None:
    """A worker thread's life: `jobs` until one of them is None."""
    if cpu is not None:
        with contextlib.suppress(OSError):  # the mask has changed meanwhile, or a sandbox forbids it
            os.sched_setaffinity(0, {cpu})
    while (job := jobs.get()) is not None:
        kernel, index, workers, args, barrier, ended, done = job
        error: BaseException | None = None
        try:
            kernel(index, workers, *args)
        except BaseException as caught:  # noqa: BLE001 - handed to the caller
            abort(barrier)
            error = caught
        ended.append(error)
        if len(ended) >= workers:
            done.put(None)  # the last one wakes the caller
        del job, kernel, args, barrier, ended, done, error  # an idle worker keeps nothing alive
