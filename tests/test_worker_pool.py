"""The worker pool: everyone runs, errors and Ctrl-C arrive after all have ended, idle threads cost nothing."""

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
