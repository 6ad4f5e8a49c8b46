"""Clients that vanish, do not read, send too much or are too many: nobody else is held up, and nothing stays."""

import json
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from fake_engine import FakeEngine
from server_cases import CHAT, HELLO, running, service_of

LONG = "many words " * 400


def connect(url):
    """A connection with little room for what is not read yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect((urlsplit(url).hostname, urlsplit(url).port))
    return client


def send(client, body, path=CHAT):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)


def until(condition, seconds=5.0):
    """Wait for `condition`; whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_are_given_up_at_once(stream):
    engine = FakeEngine(LONG, pause=0.01)
    service = service_of(engine)
    with running(service) as url:
        clients = [connect(url) for _ in range(200)]
        for number, client in enumerate(clients):
            n = {"n": 2} if number % 4 == 0 else {}
            send(client, {"messages": HELLO, "stream": stream, "max_tokens": 900} | n)
        assert until(lambda: engine.open == 250)
        for client in clients:
            client.close()
        assert until(lambda: engine.open == 0)
        assert (engine.finished, len(engine.requests)) == (0, 250)
        assert until(lambda: service.active == 0)
        assert httpx.get(f"{url}/health").status_code == 200


def test_one_who_does_not_read_holds_up_nobody_and_is_dropped():
    engine = FakeEngine(LONG)
    service = service_of(engine, patience=0.5)
    body = {"messages": HELLO, "stream": True, "max_tokens": 900, "logprobs": True, "top_logprobs": 20}
    with running(service, buffer=8192) as url:
        slow = connect(url)
        send(slow, body)
        assert until(lambda: engine.open)
        answer = httpx.post(f"{url}{CHAT}", json={"messages": HELLO, "max_tokens": 5})
        assert answer.status_code == 200 and engine.open  # the other one is done, the slow one is not
        assert until(lambda: not engine.open and not service.active)
        assert engine.finished == 1
        slow.close()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_100_mb_is_refused_in_little_memory(chunked):
    piece = b" " * 2**20

    def pieces():
        yield b'{"messages": ['
        for _ in range(100):
            yield piece

    headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(100 * 2**20 + 14)})
    with running(service_of(FakeEngine())) as url:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = httpx.post(f"{url}{CHAT}", content=pieces(), headers=headers, timeout=30)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert grown < 32 * 1024  # KiB
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_that_does_not_come():
    service = service_of(FakeEngine(), patience=0.2)
    with running(service) as url, connect(url) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert until(lambda: service.active == 0)


def test_connections_that_say_nothing_are_closed():
    with running(service_of(FakeEngine(), patience=0.2)) as url, connect(url) as client:
        assert client.recv(100) == b""


def test_connections_beyond_the_most_are_told_so():
    with running(service_of(FakeEngine(), max_connections=20)) as url:
        clients = [connect(url) for _ in range(300)]
        refused = []
        for client in clients[20:]:
            refused.append(b"".join(iter(lambda client=client: client.recv(1000), b"")))
        assert all(text.startswith(b"HTTP/1.1 503") and b'"unavailable_error"' in text for text in refused)
        for client in clients:
            client.close()
        assert until(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_garbage_is_refused_and_nothing_else():
    engine = FakeEngine()
    with running(service_of(engine)) as url:
        for sent in (
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/9\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 9999,
        ):
            with connect(url) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100)[:12] in (b"HTTP/1.1 400", b"")
        assert httpx.post(f"{url}{CHAT}", json={"messages": HELLO}).status_code == 200


def test_a_stopped_engine_answers_all_who_wait():
    engine = FakeEngine(LONG, pause=0.01)
    service = service_of(engine)
    engine.on_failure(lambda error: service.fail(error))
    with running(service) as url, ThreadPoolExecutor(20) as pool, httpx.Client(base_url=url, timeout=10) as client:
        body = {"messages": HELLO, "max_tokens": 900}
        asked = [pool.submit(client.post, CHAT, json=body | {"stream": number % 2 == 0}) for number in range(20)]
        assert until(lambda: engine.open == 20)
        engine.fail(RuntimeError("a worker died"))
        answers = [each.result() for each in asked]
        assert {answer.status_code for answer in answers[1::2]} == {500}
        assert {answer.status_code for answer in answers[::2]} <= {200, 500}  # 200 where it had begun
        assert all("a worker died" in answer.text for answer in answers)
        assert client.get("/health").status_code == client.post(CHAT, json=body).status_code == 503
