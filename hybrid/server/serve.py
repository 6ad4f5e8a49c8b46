"""Running the server: one process from its socket to its exit code.

The event loop has the main thread; the model loads on a thread of its own, while `/health` says so. Ctrl-C and SIGTERM
end it: no more requests are taken, answers may go on for the grace, then the rest is cancelled. A second one ends the
process at once. An engine that fails ends it too, once those who wait have been told.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from hybrid.errors import HybridError, InputError
from hybrid.server.app import create_app
from hybrid.server.errors import UNAVAILABLE, ApiError, error_body
from hybrid.server.protocols import ServingEngine
from hybrid.server.service import Service
from hybrid.server.settings import ServerSettings
from hybrid.server.wire import dump

_FLUSH_SECONDS = 2  # that answers which are complete may take to be read, once the server ends
_BACKLOG = 2048
_OTHER_FILES = 256  # open beside connections, and those that are told that they are too many
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(load: Callable[[], ServingEngine], settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve what `load` gives until a signal comes; `say` gets lines for people.

    Raises `InputError` where the address cannot be had, what `load` raises, and `HybridError` when the engine fails.
    """
    allow_files(settings.max_connections + _OTHER_FILES)
    with listen(settings) as listener:
        asyncio.run(_Life(load, settings, say, listener).run())


def allow_files(count: int) -> None:
    """Let this process have `count` files open: each connection is one, and 1024 are what is usual.

    Raises `InputError` where it may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            problem = f"{count} open files are needed, the system allows {hard} (ulimit -n)"
            raise InputError(f"{problem}; allow fewer connections", setting="max_connections")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens at the settings' address. Raises `InputError` where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        problem = f"cannot listen at {settings.host} port {settings.port}: {error.strerror}"
        raise InputError(f"{problem}; give another", setting="port") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that reads no more is dropped; accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.patience))
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class HttpServer(uvicorn.Server):
    """uvicorn as we run it: no logs, no signals of its own, bounded connections."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_connections(service.settings),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=int(max(1, service.settings.patience)),
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are not taken here."""
        yield


def _connections(settings: ServerSettings) -> type[H11Protocol]:
    """The connection's class: one too many is told so and closed; one that sends nothing is closed after a while."""
    refusal = ApiError(503, f"{settings.max_connections} connections are open, no more are taken", UNAVAILABLE)
    content = dump(error_body("", refusal))
    head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close"
    busy = f"{head}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.write(busy)
                transport.close()
                return
            self.timeout_keep_alive_task = self.loop.call_later(settings.patience, self.timeout_keep_alive_handler)

    return Connection


class _Life:
    """One run of the server."""

    def __init__(
        self,
        load: Callable[[], ServingEngine],
        settings: ServerSettings,
        say: Callable[[str], None],
        listener: socket.socket,
    ) -> None:
        self._load, self._settings, self._say, self._listener = load, settings, say, listener
        self._service = Service(settings)
        self._url = address_of(listener)
        self._failure: BaseException | None = None

    async def run(self) -> None:
        """From loading to the end. Raises as `serve` does."""
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._loop.add_signal_handler(number, self._on_signal, number)
        server = HttpServer(create_app(self._service), self._service)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        self._say(f"loading; {self._url} answers 503 until the model is there")
        threading.Thread(target=self._load_engine, daemon=True).start()
        ended = asyncio.create_task(self._ended.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        await self._finish()
        server.should_exit = True
        await serving
        if self._failure is not None:
            raise self._failure

    def _load_engine(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:  # noqa: BLE001 - raised on the main thread
            self._call(self._fail, error)
        else:
            gc.collect()
            gc.freeze()  # what was loaded stays: to go through it again held up answers for 80 ms now and then
            engine.on_failure(lambda error: self._call(self._on_failure, error))
            self._call(self._on_loaded, engine)

    def _call(self, what: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(what, *arguments)

    def _on_loaded(self, engine: ServingEngine) -> None:
        self._service.engine = engine
        self._say(f"{engine.name} ({engine.plan.summary()}) at {self._url}/v1; Ctrl-C ends")

    def _on_failure(self, error: BaseException) -> None:
        failure = HybridError(f"the engine stopped: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._service.fail(error)
        self._fail(failure)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._ended.set()

    def _on_signal(self, number: int) -> None:
        if self._ended.is_set():
            os._exit(128 + number)
        active = self._service.active
        grace = f"{active} under way may go on for {self._settings.grace:g} s; " if active else ""
        self._say(f"ending; {grace}once more ends at once")
        self._service.stopping = True
        self._ended.set()

    async def _finish(self) -> None:
        """Let answers under way come to their end, or be told that there is none."""
        self._service.stopping = True
        engine, grace = self._service.engine, self._settings.grace
        if engine is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace + _FLUSH_SECONDS):
                    await engine.close(0.0 if self._failure else grace)
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                while self._service.active:
                    await asyncio.sleep(0.01)
