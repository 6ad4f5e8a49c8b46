"""The chat over a server's model: the answers, the counters, and one line for each thing that can go wrong."""

import io
import socket
import threading

import pytest
from fake_chat import ScriptedTerminal
from fake_engine import FakeEngine
from server_cases import HELLO, running, service_of

from hybrid import cli
from hybrid.chat.remote import RemoteModel
from hybrid.chat.repl import run_repl
from hybrid.errors import ContextError, HybridError, InputError
from hybrid.generation import SamplingSettings

SETTINGS = SamplingSettings(temperature=0.5, seed=3, stop=("x",), max_new_tokens=9)


@pytest.fixture
def engine():
    return FakeEngine("one two three")


@pytest.fixture
def url(engine):
    with running(service_of(engine, api_key="secret")) as url:
        yield url


@pytest.fixture
def model(url):
    return RemoteModel(url, "secret")


def test_an_answer_comes_in_steps_with_the_servers_counters(engine, model):
    steps = list(model.reply(HELLO, SETTINGS, lambda done, total: None))
    assert "".join(step.text for step in steps) == "one two three"
    assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["stop"]
    stats = steps[-1].stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (4, 1, 4)
    assert (stats.ttft_seconds, stats.decode_seconds, stats.active_share, stats.hot_share) == (0.5, 0.75, 0.5, None)
    assert engine.requests[0].settings == SamplingSettings(
        temperature=0.5, seed=3, stop=("x",), max_new_tokens=9, top_k=40, top_p=0.95
    )


def test_what_the_server_runs(engine, model):
    assert (model.context, model.name, model.settings) == (1024, "fake", engine.settings)
    assert model.count_tokens(HELLO) == len(engine.codec.encode_chat(HELLO))
    assert model.describe_placement().startswith("fake at http://127.0.0.1:")


def test_an_answer_at_its_limit(model):
    *_, last = model.reply(HELLO, SamplingSettings(max_new_tokens=2), lambda done, total: None)
    assert (last.finish, last.stats.generated_tokens) == ("length", 2)


def test_the_whole_chat(engine, model):
    terminal = ScriptedTerminal(["Hello", "/placement", "And?", "/undo"])
    run_repl(model, terminal, SETTINGS, "be brief")
    assert terminal.answers == "one two three\none two three\n"
    assert len(engine.requests) == 2
    talk = [{"role": "system", "content": "be brief"}, *HELLO, {"role": "assistant", "content": "one two three"}]
    assert engine.requests[1].prompt == tuple(engine.codec.encode_chat([*talk, {"role": "user", "content": "And?"}]))
    assert terminal.of("notice")[0] == "4 tokens | 4.0 tok/s | TTFT 500 ms | active 50.0%"


def test_an_answer_that_is_left_is_given_up(engine, model):
    engine.text, engine.pause = "word " * 300, 0.01
    steps = model.reply(HELLO, SETTINGS, lambda done, total: None)
    next(steps)
    assert engine.open == 1
    steps.close()
    for _ in range(500):
        if not engine.open:
            break
        threading.Event().wait(0.005)
    assert (engine.open, engine.finished) == (0, 0)


def test_what_the_server_refuses_is_one_line(engine, model, url):
    with pytest.raises(ContextError, match="a prompt of 2"):
        list(model.reply([{"role": "user", "content": "word " * 2000}], SETTINGS, lambda done, total: None))
    engine.most = 0
    with pytest.raises(HybridError, match="the server refuses: 0 requests wait already"):
        list(model.reply(HELLO, SETTINGS, lambda done, total: None))
    with pytest.raises(HybridError, match="a valid API key is needed"):
        RemoteModel(url)


def test_an_engine_that_fails_in_the_middle(engine, model):
    engine.pause = 0.01
    steps = model.reply(HELLO, SETTINGS, lambda done, total: None)
    next(steps)
    engine.fail(RuntimeError("a worker died"))
    with pytest.raises(HybridError, match="RuntimeError: a worker died"):
        list(steps)


def test_no_server():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(HybridError, match=rf"no server answers at http://127.0.0.1:{port}: Connection refused; start"):
        RemoteModel(f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", "what is no JSON object: b'hi'"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "its /props lack 'default_generation_settings'"),
        (b"SSH-2.0-x\r\n", "no server answers"),
    ],
)
def test_another_server(answer, message):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection = listener.accept()[0]
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(HybridError, match=message):
            RemoteModel(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://a:b", "http://[1"])
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="is no server's URL"):
        RemoteModel(url)


def test_the_command_answers_piped_lines(engine, url, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    monkeypatch.setenv("HYBRID_API_KEY", "secret")
    assert cli.run(["chat", "--url", url, "--temperature", "0.5", "--system", "be brief"]) == 0
    assert capfd.readouterr().out == "one two three\n"
    (request,) = engine.requests
    assert (request.settings.temperature, request.settings.top_k) == (0.5, 40)
    asked = [{"role": "system", "content": "be brief"}, *HELLO]
    assert request.prompt == tuple(engine.codec.encode_chat(asked))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--url", "127.0.0.1:1"], 1, "hybrid: no server answers at http://127.0.0.1:1: Connection refused"),
        (["--url", "nonsense:x"], 2, "is no server's URL, expected one such as http://127.0.0.1:8080 (--url)"),
        (["--url", "127.0.0.1:1", "--threads", "1"], 2, "--threads is for a model that runs here"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(options, code, message, capfd):
    assert cli.run(["chat", *options]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
