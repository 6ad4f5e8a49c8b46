"""What goes wrong while two devices write an answer: it ends soon, with its error, and the next answer is right."""

import gc
import random
import signal
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
from gpu_cases import DEVICE
from step_cases import GREEDY, PROMPT, answer, load_engine, some_tokens, tiny_model, use_references

from cpu_kernels.contract import Flag, Word
from cpu_kernels.mailbox import serve
from cpu_kernels.worker_pool import WorkerPool
from hybrid.runtime.gpu.cold_workers import ColdWorkers, start_thread
from hybrid.runtime.gpu.step import GpuStep

pytest.importorskip("transformers")
NATIVE = DEVICE == "cuda"
SOON = 20.0  # seconds within which whatever happens must be over
SHORT = 0.2  # seconds of a timeout


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama-relu", tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(folder):
    made = load_engine(folder)
    yield made
    made.close()
    assert not serving()


def serving():
    """Whether the mailbox's thread is alive; it may take a moment to end. One whose start was interrupted never lived,
    but is listed for ever."""
    end = time.monotonic() + 1
    while any(thread.name == "hybrid-mailbox" and thread.is_alive() for thread in threading.enumerate()):
        if time.monotonic() > end:
            return True
        time.sleep(1e-3)
    return False


@contextmanager
def soon():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON


def forget_graphs(engine):
    """Graphs hold the timeout that they were captured with."""
    engine.runner.step._graphs.clear()


# Workers that fail


def replace_serve(monkeypatch, function):
    """Let workers run `function(worker, workers, state, box, *rest)` in the place of `serve`."""
    real = WorkerPool.run

    def run(pool, kernel, workers, *args):
        return real(pool, function if kernel is serve else kernel, workers, *args)

    monkeypatch.setattr(WorkerPool, "run", run)


def fails_at_once(worker, workers, state, box, *rest):
    raise RuntimeError("a worker failed")


def fails_at_the_third_request(worker, workers, state, box, *rest):
    if worker == 0:
        serve(worker, workers, state, box, *rest)
    box.flags[Flag.READY] = 1
    while worker and not box.flags[Flag.STOP] and box.request[Word.NUMBER] < 3:
        if box.request[Word.NUMBER] > box.flags[Flag.DONE]:
            box.flags[Flag.DONE] += 1
    if worker:
        raise RuntimeError("a worker failed")


@pytest.mark.parametrize("function", [fails_at_once, fails_at_the_third_request])
def test_what_a_worker_raises_reaches_the_caller(engine, monkeypatch, function):
    whole = answer(engine)
    with monkeypatch.context() as patched:
        replace_serve(patched, function)
        with soon(), pytest.raises(RuntimeError, match="a worker failed"):
            answer(engine)
        assert not serving()
    assert answer(engine) == whole


def never_answers(worker, workers, state, box, *rest):
    box.flags[Flag.READY] = 1
    while not box.flags[Flag.STOP]:
        time.sleep(1e-3)


def is_stopped_for_a_while(worker, workers, state, box, *rest):
    box.flags[Flag.READY] = 1
    time.sleep(1.0)


@pytest.mark.parametrize("function", [never_answers, is_stopped_for_a_while])
def test_workers_that_do_not_answer_in_time(engine, monkeypatch, function):
    whole, workers = answer(engine), engine.runner.step._workers
    with monkeypatch.context() as patched:
        patched.setattr(workers, "mailbox", replace(workers.mailbox, timeout=SHORT))
        forget_graphs(engine)
        replace_serve(patched, function)
        with soon(), pytest.raises(RuntimeError, match="workers did not answer the GPU within"):
            answer(engine)
        assert not serving()
    forget_graphs(engine)
    assert answer(engine) == whole


# Answers that are given up


def test_workers_rest_between_answers_only(engine):
    steps = engine.generate(PROMPT, GREEDY)
    next(steps)
    next(steps)
    assert serving()
    list(steps)
    assert not serving()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_an_answer_that_is_given_up(engine, how):
    whole = answer(engine)
    engine.reset()
    steps = engine.generate(PROMPT, GREEDY)
    assert [next(steps).token for _ in range(3)] == whole[:3]
    if how == "close":
        steps.close()
    del steps
    gc.collect()
    assert not serving()
    assert answer(engine) == whole


def test_an_answer_that_is_dropped_in_the_middle_of_anothers_step(engine, monkeypatch):
    """As the garbage collector may: the workers are the other answer's by then."""
    whole, old = answer(engine), engine.generate(PROMPT, GREEDY)
    next(old)
    next(old)
    real = GpuStep._embed

    def drop(*args):
        old.close()
        real(*args)

    monkeypatch.setattr(GpuStep, "_embed", drop)
    assert answer(engine) == whole


def test_workers_that_are_stopped_in_the_middle_of_a_step(engine, monkeypatch):
    whole, real = answer(engine), GpuStep._embed
    with monkeypatch.context() as patched:
        patched.setattr(GpuStep, "_embed", lambda step, *args: (real(step, *args), step.rest()))
        with soon(), pytest.raises(RuntimeError, match="sent home in the middle of a step"):
            answer(engine)
    assert answer(engine) == whole


def test_an_engine_that_is_closed_in_mid_answer(folder):
    engine = load_engine(folder)
    steps = engine.generate(PROMPT, GREEDY)
    next(steps)
    next(steps)
    with soon():
        engine.close()
    assert not serving()
    with soon():
        steps.close()
        engine.close()
    assert not serving()


def test_an_engine_that_is_dropped_in_mid_answer(folder):
    engine = load_engine(folder)
    gone, steps = weakref.ref(engine), engine.generate(PROMPT, GREEDY)
    next(steps)
    next(steps)
    with soon():
        del engine, steps
        gc.collect()
    assert gone() is None and not serving()


def test_two_engines_answer_by_turns(folder, engine):
    prompts = PROMPT, some_tokens(4, 9)
    with load_engine(folder) as other:
        expected = [answer(engine, prompts[0]), answer(engine, prompts[1])]
        for made in (engine, other):
            made.reset()
        both = [
            (one.token, two.token)
            for one, two in zip(engine.generate(prompts[0], GREEDY), other.generate(prompts[1], GREEDY), strict=True)
        ]
        assert [list(tokens) for tokens in zip(*both, strict=True)] == expected
        assert answer(other, prompts[0]) == expected[0]


# Ctrl-C


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GpuStep, "_embed"),
        (GpuStep, "_launch"),
        (GpuStep, "_begin_ffn"),
        (GpuStep, "_end_ffn"),
        (GpuStep, "_check"),
        (GpuStep, "_count"),
        (ColdWorkers, "start"),
        (ColdWorkers, "stop"),
    ],
)
def test_ctrl_c_in_a_step(engine, monkeypatch, owner, name, count, after):
    """Before or after a function is called for the first time, in the prompt, and for the fourth, in the answer."""
    whole, real, calls = answer(engine), getattr(owner, name), []
    engine.reset()
    if NATIVE and name in ("_launch", "_begin_ffn", "_end_ffn"):
        pytest.skip("a graph is replayed without them")

    def interrupted(*args):
        calls.append(name)
        if len(calls) != count:
            return real(*args)
        if after:
            real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with soon(), pytest.raises(KeyboardInterrupt):
            for _ in range(4):
                list(engine.generate(PROMPT, GREEDY))
    engine.runner.rest()
    assert not serving()
    assert answer(engine) == whole


def test_ctrl_c_in_the_wait_of_a_threads_start_remains_ctrl_c(engine, monkeypatch):
    """It comes once the wait has released its lock, which the wait's caller then releases once more."""
    whole = answer(engine)
    engine.runner.rest()

    def interrupted(self):
        self._lock.release()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "_release_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(engine)
    assert answer(engine) == whole


def test_a_thread_that_cannot_start_says_so():
    def fails():
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="start new thread"):
        start_thread(SimpleNamespace(start=fails))


def test_ctrl_c_at_any_moment(engine):
    """A signal after some random time, in Python's code wherever that is, time and again."""
    whole = answer(engine)
    start = time.monotonic()
    answer(engine)
    usual, moments, armed = time.monotonic() - start, random.Random(0), set()

    def interrupt(number, frame):
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(60):
            with soon():
                with suppress(KeyboardInterrupt):
                    armed.add(number)
                    signal.setitimer(signal.ITIMER_REAL, max(1e-3, moments.random() * usual))
                    answer(engine)
                    armed.clear()
                assert answer(engine) == whole
    finally:
        signal.signal(signal.SIGALRM, before)
