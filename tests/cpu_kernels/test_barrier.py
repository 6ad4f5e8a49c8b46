"""The barrier inside kernels: all arrive before one leaves, for any number of workers; an abort sends everyone home."""

import threading

import numpy as np
import pytest
from numba import njit

from cpu_kernels.barrier import abort, new_barrier, reset, wait


@njit(nogil=True)
def rounds(worker, workers, state, count, seen):
    """Each round writes its number, waits, and checks that all have written it; returns the rounds that were right."""
    right = 0
    for number in range(1, count + 1):
        seen[worker] = number
        if not wait(state, workers):
            return -1 - right
        ok = True
        for other in range(workers):
            ok = ok and seen[other] == number
        right += ok
        if not wait(state, workers):
            return -1 - right
    return right


def run_threads(workers, state, count, present=None):
    """Results of `rounds` by worker; only `present` of them take part."""
    rounds(0, 1, new_barrier(), 1, np.zeros(1, np.int64))  # compiled before threads meet
    seen, results = np.zeros(workers, np.int64), [None] * workers

    def body(worker):
        results[worker] = rounds(worker, workers, state, count, seen)

    threads = [threading.Thread(target=body, args=(w,)) for w in range(present or workers)]
    for thread in threads:
        thread.start()
    return threads, results


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_nobody_leaves_before_all_arrive(workers):
    state = new_barrier()
    for _ in range(2):
        threads, results = run_threads(workers, state, 1000)
        for thread in threads:
            thread.join(30)
        assert results == [1000] * workers
        reset(state)


def test_abort_sends_everyone_home_and_reset_makes_it_new():
    state = new_barrier()
    threads, results = run_threads(3, state, 10, present=2)
    threads[0].join(0.05)
    assert all(thread.is_alive() for thread in threads)
    abort(state)
    for thread in threads:
        thread.join(10)
    assert results == [-1, -1, None]
    assert not wait(state, 1)
    reset(state)
    threads, results = run_threads(3, state, 10)
    for thread in threads:
        thread.join(10)
    assert results == [10] * 3


def test_counters_do_not_share_cache_lines():
    state = new_barrier()
    assert state.ctypes.data % 128 == 0
    assert state.dtype == np.int64
