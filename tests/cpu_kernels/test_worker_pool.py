"""The worker pool: everyone runs, errors and Ctrl-C arrive after all have ended, idle threads cost nothing, nothing
hangs."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from cpu_kernels import worker_pool
from cpu_kernels.barrier import wait
from cpu_kernels.worker_pool import WorkerPool, available_cpus, worker_cpus


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


# The signals come from a thread of the program's own, each only once the program stands where it catches it.
PRESSED = """
import os, signal, threading, time
from cpu_kernels.barrier import wait
from cpu_kernels.worker_pool import WorkerPool
ready, pressed = threading.Event(), threading.Event()
def press(times):
    for n in range(60):
        ready.wait()
        ready.clear()
        time.sleep(0.003 + n % 7 * 0.0007)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(n % 5 * 0.00003)
        pressed.set()
pool, caught = WorkerPool(3), 0
"""


def test_a_real_ctrl_c_at_any_moment_never_hangs():
    """Signals at random moments of many short runs, in a process of its own, which must end by itself each time."""
    program = """
threading.Thread(target=press, args=(1,), daemon=True).start()
for _ in range(60):
    try:
        ready.set()
        while True:
            pool.run(lambda worker, workers: None, 3)
    except KeyboardInterrupt:
        caught += 1
pool.close()
print(caught)
"""
    result = subprocess.run([sys.executable, "-c", PRESSED + program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "60\n", result.stderr


def wait_unless_it_fails(worker, workers, barrier, failing, ended):
    """Everyone but `failing` waits for everyone."""
    if worker == failing:
        raise ZeroDivisionError
    ended.append(wait(barrier, workers))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failing_worker_sends_the_others_home_from_the_barrier(pool, failing):
    ended = []
    with pytest.raises(ZeroDivisionError):
        pool.run(wait_unless_it_fails, 3, pool.barrier, failing, ended)
    assert ended == [False, False]
    pool.run(wait_unless_it_fails, 4, pool.barrier, None, ended)
    assert ended == [False, False, True, True, True, True]


def test_ctrl_c_while_workers_wait_for_each_other_never_hangs():
    """Twice in a row each time, so that some hit while the first is dealt with."""
    program = """
def meet(worker, workers, barrier):
    for _ in range(3):
        wait(barrier, workers)
pool.run(meet, 3, pool.barrier)
threading.Thread(target=press, args=(2,), daemon=True).start()
for _ in range(60):
    try:
        try:
            ready.set()
            while True:
                pool.run(meet, 3, pool.barrier)
        except KeyboardInterrupt:
            pressed.wait()
            time.sleep(0.001)  # for the second, where it was late
    except KeyboardInterrupt:
        pass
    caught += 1
    pressed.wait()
    pressed.clear()
pool.run(meet, 3, pool.barrier)
pool.close()
print(caught)
"""
    result = subprocess.run([sys.executable, "-c", PRESSED + program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "60\n", result.stderr


def test_what_an_interrupted_run_left_behind_ends_before_the_next(pool):
    """As after a second Ctrl-C in the moment of the first: `run` is left while a worker waits on the barrier."""
    left = []
    pool._jobs[0].put((lambda w, n, b: left.append(wait(b, n)), 1, 2, (pool.barrier,), pool.barrier, [], FakeQueue()))
    pool._unsettled = True
    pool.run(lambda worker, workers: left.append(worker), 1)
    assert left == [False, 0]


class FakeQueue:
    def put(self, item):
        pass


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
    assert threading.active_count() == before + 3
    pool.close()
    pool.close()
    assert threading.active_count() == before


def run_slowly(pool, entered, ended):
    def kernel(worker, workers):
        entered.set()
        time.sleep(0.1)
        ended.append(worker)

    pool.run(kernel, 2)


def test_close_from_another_thread_waits_for_the_run():
    pool, entered, ended = WorkerPool(2), threading.Event(), []
    runner = threading.Thread(target=run_slowly, args=(pool, entered, ended))
    runner.start()
    entered.wait(10)
    pool.close()
    assert sorted(ended) == [0, 1]
    runner.join(10)
    with pytest.raises(ValueError, match="2 workers asked of a pool of 1 threads"):
        pool.run(print, 2)
    pool.run(lambda worker, workers: ended.append(workers), 1)
    assert ended[-1] == 1


def test_two_callers_take_turns(pool):
    ended, entered = [], threading.Event()
    callers = [threading.Thread(target=run_slowly, args=(pool, entered, ended)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert [sorted(ended[at : at + 2]) for at in (0, 2, 4)] == [[0, 1]] * 3


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("call", ["run", "close"])
def test_a_kernel_that_uses_its_own_pool_is_an_error_and_no_hang(pool, worker, call):
    def kernel(number, workers):
        if number == worker:
            pool.close() if call == "close" else pool.run(print, 1)

    with pytest.raises(RuntimeError, match="may neither run nor close"):
        pool.run(kernel, 2)


def exit_code(child):
    for _ in range(500):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    raise AssertionError("the child hangs")


@pytest.mark.parametrize("used", [True, False])
def test_a_forked_child_starts_its_own_workers(pool, used):
    """It says by its exit code how many ran there; its copy of the pool can also be closed unused."""
    seen = []
    pool.run(lambda worker, workers: None, 4)
    child = os.fork()
    if child == 0:
        if used:
            pool.run(lambda worker, workers: seen.append(worker), 4)
        pool.close()
        os._exit(len(seen))
    assert exit_code(child) == (4 if used else 0)
    pool.run(lambda worker, workers: seen.append(worker), 4)
    assert len(seen) == 4


def test_the_interpreter_ends_while_workers_are_at_work():
    program = """
import threading, time
from cpu_kernels.worker_pool import WorkerPool
pool, entered = WorkerPool(2), threading.Event()
def kernel(worker, workers):
    entered.set()
    time.sleep(60)
threading.Thread(target=pool.run, args=(kernel, 2), daemon=True).start()
entered.wait()
print("end")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert result.stdout == "end\n" and result.returncode == 0, result.stderr


def test_workers_are_pinned_apart_and_the_caller_is_not():
    before, masks = os.sched_getaffinity(0), {}
    count = len(before)
    pool = WorkerPool(count)
    pool.run(lambda worker, workers: masks.update({worker: os.sched_getaffinity(0)}), count)
    pool.close()
    assert before == os.sched_getaffinity(0)
    if available_cpus() == count > 1:
        pinned = [cpu for mask in masks.values() for cpu in mask]
        assert len(set(pinned)) == len(pinned) == count
        assert set(pinned) <= before


@pytest.mark.parametrize(
    ("threads", "quota", "expected"),
    [
        (1, 8, [None]),
        (3, 8, [None] * 3),
        (4, 8, [0, 1, 2, 3]),
        (6, 8, [0, 1, 2, 3, 4, 5]),
        (9, 8, [None] * 9),
        (4, 4, [None] * 4),
    ],
)
def test_only_a_pool_that_takes_every_core_is_pinned(monkeypatch, threads, quota, expected):
    """4 cores of 2 CPUs; with a quota below the mask, others run on the same CPUs."""
    monkeypatch.setattr(worker_pool, "allowed_cpus", lambda: list(range(8)))
    monkeypatch.setattr(worker_pool, "cores_of", lambda cpus: [[core, core + 4] for core in range(4)])
    monkeypatch.setattr(worker_pool, "available_cpus", lambda: quota)
    monkeypatch.setattr(worker_pool, "pinned_threads", lambda: Counter())
    assert worker_cpus(threads) == expected


def test_sizes(pool):
    assert available_cpus() >= 1
    with pytest.raises(ValueError, match="at least 1 thread"):
        WorkerPool(0)
    for workers in (0, 5):
        with pytest.raises(ValueError, match=f"{workers} workers asked of a pool of 4 threads"):
            pool.run(print, workers)
