"""Engines on two devices and processes: fork, signals, being stopped, and an end in mid-answer."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpu_cases import DEVICE
from step_cases import GREEDY, PROMPT, answer, load_engine, tiny_model, use_references

pytest.importorskip("transformers")
NATIVE = DEVICE == "cuda"
SOON = 20.0  # seconds within which whatever happens must be over
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama-relu", tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(folder):
    with load_engine(folder) as made:
        yield made


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
    with load_engine(folder, gpu=False) as engine:
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
import pytest, torch
from step_cases import use_references
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.model.loader import ModelFolder
from placement.placement import Placement
folder, device, what = sys.argv[1:]
use_references(pytest.MonkeyPatch())
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
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", SCRIPT, str(folder), DEVICE, what]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
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
        time.sleep(10.0)
        process.send_signal(signal.SIGCONT)
        out, errors = process.communicate(timeout=10 + SOON)
        assert out.splitlines()[-1] == "same" and process.returncode == 0, errors
        assert all("did not answer the GPU" in line for line in out.splitlines()[:-1])
