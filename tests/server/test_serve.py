"""The life of a server: loading, signals, the grace, a failing engine; on the main thread, as the command runs it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine
from server_cases import CHAT, HELLO

from hybrid.errors import HybridError, InputError, ModelError
from hybrid.server import serve as serving
from hybrid.server.settings import ServerSettings

LONG = "many words " * 400


def serve(act, load, **settings):
    """Run the server here and `act(url, said)` on another thread; what was said and what `act` gave."""
    said, results = [], []

    def say(line):
        said.append(line)
        if len(said) == 1:
            url = re.search(r"http://\S+", line)[0]
            thread.append(threading.Thread(target=lambda: results.append(act(url, said))))
            thread[0].start()

    thread = []
    try:
        serving.serve(load, ServerSettings(port=0, **settings), say)
    finally:
        thread[0].join(10)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return said, results[0]


@pytest.fixture(autouse=True)
def sigint():
    """Ctrl-C is handled after each test as before it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def ready(url):
    for _ in range(500):
        if httpx.get(f"{url}/health").status_code == 200:
            return
        time.sleep(0.01)
    raise AssertionError("never ready")


def when_busy(engine, act):
    """Have `act` called on another thread once an answer is under way."""

    def wait():
        while not engine.open:
            time.sleep(0.005)
        act()

    threading.Thread(target=wait).start()


def stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_health_follows_the_loading():
    loaded = threading.Event()

    def load():
        loaded.wait(10)
        return FakeEngine()

    def act(url, said):
        before = httpx.get(f"{url}/health")
        loaded.set()
        ready(url)
        stop(signal.SIGINT)
        return before

    said, before = serve(act, load)
    assert (before.status_code, before.json()["error"]["type"]) == (503, "unavailable_error")
    assert [line.split()[0] for line in said] == ["loading;", "fake", "ending;"]


def test_answers_may_come_to_their_end_within_the_grace():
    engine = FakeEngine("one two three", pause=0.05)

    def act(url, said):
        ready(url)
        when_busy(engine, stop)
        answer = httpx.post(f"{url}{CHAT}", json={"messages": HELLO}, timeout=10)
        return answer.json()["choices"][0]["message"]["content"]

    said, text = serve(act, lambda: engine, grace=5)
    assert text == "one two three" and "1 under way may go on for 5 s" in said[-1]


@pytest.mark.parametrize("stream", [True, False])
def test_after_the_grace_the_rest_is_told(stream):
    engine = FakeEngine(LONG, pause=0.01)

    def act(url, said):
        ready(url)
        when_busy(engine, stop)
        asked = {"messages": HELLO, "stream": stream, "max_tokens": 900}
        answer = httpx.post(f"{url}{CHAT}", json=asked, timeout=10)
        return answer.status_code, "the engine is closed" in answer.text

    start = time.monotonic()
    _, told = serve(act, lambda: engine, grace=0.2)
    assert told == (200 if stream else 503, True)
    assert engine.open == 0 and time.monotonic() - start < 4


def test_while_it_ends_nothing_new_is_taken():
    engine = FakeEngine(LONG, pause=0.01)

    def act(url, said):
        ready(url)
        body = {"messages": HELLO, "max_tokens": 60}
        first = threading.Thread(target=httpx.post, args=(f"{url}{CHAT}",), kwargs={"json": body, "timeout": 10})
        first.start()
        while not engine.open:
            time.sleep(0.01)
        stop()
        time.sleep(0.1)
        refused = httpx.post(f"{url}{CHAT}", json=body).status_code, httpx.get(f"{url}/health").status_code
        first.join()
        return refused

    assert serve(act, lambda: engine)[1] == (503, 503)
    assert (len(engine.requests), engine.finished) == (1, 1)


def test_a_second_signal_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(serving.os, "_exit", codes.append)
    engine = FakeEngine(LONG, pause=0.01)

    def act(url, said):
        ready(url)
        body = {"messages": HELLO, "max_tokens": 100}
        asked = threading.Thread(target=httpx.post, args=(f"{url}{CHAT}",), kwargs={"json": body, "timeout": 10})
        asked.start()
        while not engine.open:
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT):
            stop(number)
            time.sleep(0.05)
        asked.join()

    serve(act, lambda: engine)
    assert codes == [130]


def test_an_engine_that_fails_ends_the_server():
    engine = FakeEngine(LONG, pause=0.01)

    def act(url, said):
        ready(url)
        when_busy(engine, lambda: engine.fail(RuntimeError("a worker died")))
        return httpx.post(f"{url}{CHAT}", json={"messages": HELLO}, timeout=10).status_code

    given = []
    with pytest.raises(HybridError, match="the engine stopped: RuntimeError: a worker died") as error:
        serve(lambda *arguments: given.append(act(*arguments)), lambda: engine)
    assert (given, error.value.exit_code) == ([500], 1)


def test_a_model_that_cannot_be_loaded():
    def load():
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        serve(lambda url, said: None, load)


def test_files_are_allowed_as_far_as_the_system_does(monkeypatch):
    limits = [100, 200]
    monkeypatch.setattr(serving.resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(serving.resource, "setrlimit", lambda which, given: limits.__setitem__(slice(None), given))
    serving.allow_files(150)
    assert limits == [150, 200]
    serving.allow_files(50)
    assert limits == [150, 200]
    with pytest.raises(InputError, match="201 open files are needed, the system allows 200") as error:
        serving.allow_files(201)
    assert error.value.setting == "max_connections"


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="already in use") as error:
        serving.listen(ServerSettings(port=taken.getsockname()[1]))
    assert error.value.setting == "port"


def test_a_host_that_there_is_not():
    with pytest.raises(InputError, match=r"cannot listen at 256\.1\.1\.1 port 8080"):
        serving.listen(ServerSettings(host="256.1.1.1"))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"port": 65536}, "port"),
        ({"grace": -1}, "grace"),
        ({"grace": float("nan")}, "grace"),
        ({"max_body": 0}, "max_body"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "a\n"}, "api_key"),
    ],
)
def test_settings_are_checked(settings, setting):
    with pytest.raises(InputError) as error:
        ServerSettings(**settings)
    assert error.value.setting == setting


def test_the_command_serves_and_ends():
    command = [sys.executable, "-m", "hybrid", "serve", "--port", "0", "--threads", "1", "--kv-tokens", "2048"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://\S+", process.stderr.readline())[0].rstrip(";")
        for line in process.stderr:
            if url in line:
                break
        answer = httpx.post(f"{url}{CHAT}", json={"messages": HELLO, "max_tokens": 3}, timeout=60).json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert (answer["model"], answer["usage"]["completion_tokens"] > 0) == ("model", True)
