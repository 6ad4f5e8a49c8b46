"""The worker pool: everyone runs, errors and Ctrl-C arrive after all have ended, idle threads cost nothing."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from cpu_kernels.worker_pool import WorkerPool, available_cpus


@pytest.fixture
def pool():
    made = WorkerPool(4)
    yield made
    made.close()


def test_each_worker_runs_once_on_its_own_thread(pool):
    seen = []
    pool.run(lambda worker, workers, tag: seen.append((worker, workers, tag, threading.get_ident())), 4, "x")
    assert sorted(s[:3] for s in seen) == [(w, 4, "x") for w in range(4)]
    assert len({s[3] for s in seen}) == 4


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_arrives_after_all_have_ended(pool, failing, error):
    ended = []

    def kernel(worker, workers):
        if worker == failing:
            raise error
        time.sleep(0.05)
        ended.append(worker)

    with pytest.raises(error):
        pool.run(kernel, 4)
    assert len(ended) == 3
    pool.run(lambda worker, workers: ended.append(worker), 4)
    assert len(ended) == 7


def test_a_real_ctrl_c_at_any_moment_never_hangs():
    """Signals at random moments of many short runs, in a process of its own, which must end by itself each time."""
    program = """
import os, signal, threading, time
from cpu_kernels.worker_pool import WorkerPool
pool, caught, done = WorkerPool(3), 0, False
def press():
    global done
    for n in range(60):
        time.sleep(0.003 + n % 7 * 0.0007)
        os.kill(os.getpid(), signal.SIGINT)
    done = True
threading.Thread(target=press, daemon=True).start()
while not done:
    try:
        while not done:
            pool.run(lambda worker, workers: None, 3)
    except KeyboardInterrupt:
        caught += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
pool.close()
print(caught)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert int(result.stdout) > 10, result.stderr


def test_a_dropped_pool_ends_its_threads():
    before = threading.active_count()
    pool = WorkerPool(3)
    pool.run(lambda worker, workers, data: None, 3, bytearray(10))
    del pool
    gc.collect()
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError("threads of a dropped pool are still there")


def test_idle_workers_use_no_cpu(pool):
    pool.run(lambda worker, workers: None, 4)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_small_work_wakes_nobody(pool):
    assert pool.workers_for(1000) == 1
    assert pool.workers_for(3 << 20) == 3
    assert pool.workers_for(1 << 40) == 4


def test_close_ends_the_threads_and_may_be_called_twice():
    before = threading.active_count()
    pool = WorkerPool(3)
    assert threading.active_count() == before + 2
    pool.close()
    pool.close()
    assert threading.active_count() == before


def test_sizes():
    assert available_cpus() >= 1
    with pytest.raises(ValueError, match="at least 1 thread"):
        WorkerPool(0)
