"""What goes wrong while two devices write an answer: it ends soon, with its error, and the next answer is right."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE
from step_cases import some_tokens, tiny_model, use_references

from cpu_kernels.mailbox import Flag, Word, serve
from cpu_kernels.worker_pool import WorkerPool
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.cold_workers import ColdWorkers
from hybrid.gpu_step import GpuStep
from hybrid.loader import ModelFolder
from placement.placement import Placement

pytest.importorskip("transformers")
GREEDY = SamplingSettings(temperature=0, max_new_tokens=5)
PROMPT = some_tokens(3, 2)
NATIVE = DEVICE == "cuda"
SOON = 20.0  # seconds within which whatever happens must be over
SHORT = 0.2  # seconds of a timeout
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("hybrid.kv_cache.BLOCK_SIZE", 8)
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama-relu", tmp_path_factory.mktemp("models"))


def load(folder, gpu=True):
    placement = Placement.random(ModelFolder.open(folder).spec, 0.4, 0)
    config = EngineConfig("exact", context=40, threads=2, vram_budget=None if gpu else 0)
    return Engine.load(folder, config, placement, device=torch.device(DEVICE) if gpu else None)


@pytest.fixture
def engine(folder):
    made = load(folder)
    yield made
    made.close()
    assert not serving()


def answer(engine, prompt=PROMPT):
    engine.reset()
    return [step.token for step in engine.generate(prompt, GREEDY)]


def serving():
    """The mailbox's threads that are alive; none but in the middle of an answer."""
    return [thread for thread in threading.enumerate() if thread.name == "hybrid-mailbox"]


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


def test_an_engine_that_is_closed_in_mid_answer(folder):
    engine = load(folder)
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
    engine = load(folder)
    gone, steps = weakref.ref(engine), engine.generate(PROMPT, GREEDY)
    next(steps)
    next(steps)
    with soon():
        del engine, steps
        gc.collect()
    assert gone() is None and not serving()


def test_two_engines_answer_by_turns(folder, engine):
    prompts = PROMPT, some_tokens(4, 9)
    with load(folder) as other:
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
        (GpuStep, "_ffn"),
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
    if NATIVE and name in ("_launch", "_ffn"):
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


def test_ctrl_c_at_any_moment(engine):
    """A signal after some random time, in Python's code wherever that is, time and again."""
    whole = answer(engine)
    start = time.monotonic()
    answer(engine)
    usual, moments = time.monotonic() - start, random.Random(0)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(12):
            with soon():
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(1e-3, moments.random() * usual))
                    answer(engine)
                except KeyboardInterrupt:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert answer(engine) == whole
    finally:
        signal.signal(signal.SIGALRM, before)


# Processes


def in_child(work):
    """What a forked child's `work` returns, an int below 100; 100 if it raises. It must end in time."""
    child = os.fork()
    if child == 0:
        code = 100
        try:
            code = work()
        finally:
            os._exit(code)
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def test_a_forked_child_uses_an_engine_on_the_cpu(folder):
    with load(folder, gpu=False) as engine:
        whole = answer(engine)
        assert in_child(lambda: int(answer(engine) == whole)) == 1
        assert answer(engine) == whole


@pytest.mark.skipif(NATIVE, reason="CUDA does not survive fork")
def test_a_child_forked_in_mid_answer(engine):
    whole = answer(engine)
    engine.reset()
    steps = engine.generate(PROMPT, GREEDY)
    started = [next(steps).token, next(steps).token]
    assert in_child(lambda: int(answer(engine) == whole)) == 1
    assert started + [step.token for step in steps] == whole


@pytest.mark.gpu
@needs_gpu
def test_a_forked_child_of_an_engine_on_a_gpu_gets_one_clear_error(engine):
    whole = answer(engine)

    def refused():
        try:
            answer(engine)
        except RuntimeError as error:
            return int("CUDA does not survive fork" in str(error))
        return 2

    assert in_child(refused) == 1
    assert answer(engine) == whole


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.loader import ModelFolder
from placement.placement import Placement
folder, device, what = sys.argv[1:]
placement = Placement.random(ModelFolder.open(Path(folder)).spec, 0.4, 0)
config = EngineConfig("exact", context=40, threads=2)
engine = Engine.load(folder, config, placement, device=torch.device(device))
def answer(count):
    engine.reset()
    settings = SamplingSettings(temperature=0, max_new_tokens=count)
    return engine.generate([3, 4, 5], settings)
if what == "exit":
    print("ready", flush=True)
    steps = answer(3)
    next(steps)
    next(steps)
    print("leaving", flush=True)
    sys.exit(7)
whole = [step.token for step in answer(20)]
print("ready", flush=True)
end = time.monotonic() + 10
while time.monotonic() < end:
    try:
        for step in answer(20):
            pass
    except RuntimeError as error:
        print(error, flush=True)
        break
print("same" if [step.token for step in answer(20)] == whole else "different", flush=True)
"""


@contextmanager
def script(folder, what):
    """A process that answers over and over, once it is ready."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SCRIPT, str(folder), DEVICE, what]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_ends_in_mid_answer(tmp_path):
    with script(tiny_model("llama-relu", tmp_path, layers=1), "exit") as process:
        out, errors = process.communicate(timeout=60 + SOON)
        assert (out, errors, process.returncode) == ("leaving\n", "", 7)


@pytest.mark.gpu
@needs_gpu
def test_ctrl_c_while_graphs_are_replayed(folder):
    with script(folder, "decode") as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SOON)
        assert "KeyboardInterrupt" in errors and process.returncode in (1, 130, -signal.SIGINT)


@pytest.mark.gpu
@needs_gpu
def test_a_process_that_is_stopped_for_longer_than_the_timeout(folder):
    """In the middle of a step it gets the error, between two it goes on; either way its next answer is right."""
    with script(folder, "decode") as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(7.0)
        process.send_signal(signal.SIGCONT)
        out, errors = process.communicate(timeout=10 + SOON)
        assert out.splitlines()[-1] == "same" and process.returncode == 0, errors
        assert all("did not answer the GPU" in line for line in out.splitlines()[:-1])
