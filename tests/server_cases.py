"""What the server's tests share: an application over a fake engine, asked without a socket or over one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from typing import Any

import httpx
from fake_engine import FakeEngine

from hybrid.server.app import create_app
from hybrid.server.service import Service
from hybrid.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def service_of(engine: Any = None, **settings: Any) -> Service:
    return Service(ServerSettings(**settings), engine or FakeEngine())


def ask(method: str, path: str, service: Service | None = None, **more: Any) -> httpx.Response:
    """One request to the application, without a socket; `json` and `headers` as httpx takes them."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service or service_of()))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


def post(path: str, body: Any, engine: Any = None, **more: Any) -> httpx.Response:
    return ask("POST", path, service_of(engine), json=body, **more)


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; `[DONE]` as it stands."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextlib.contextmanager
def running(service: Service, buffer: int | None = None):
    """The address of `service` on a free loopback port, served by uvicorn on a thread of its own.

    buffer: bytes that a connection holds of what its client has not read.
    """
    from hybrid.server.serve import HttpServer

    with socket.create_server(("127.0.0.1", 0)) as listener:
        if buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        server = HttpServer(create_app(service), service)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
