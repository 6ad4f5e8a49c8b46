"""What stands before the routes, as plain ASGI: who may ask, how many at once, and how much they may send.

A body is counted while it comes in. What is too long is read on for a while and dropped before it is refused, since a
client that is still sending does not read, but no longer than `_DRAIN_SECONDS`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.server.errors import UNAVAILABLE, ApiError, error_body
from hybrid.server.service import Service
from hybrid.server.wire import dump

OPEN_PATHS = frozenset({"/health", "/v1/health"})
_DRAIN_SECONDS, _DRAIN_BYTES = 5.0, 2**28


class Guard:
    """The middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return
        service = self._service
        body = _Body(receive, service.settings.max_body, service.settings.patience)
        refusal = self._refusal(scope, body)
        if refusal is not None:
            await _refuse(scope, send, refusal)
            return
        service.active += 1
        try:
            await self._app(scope, body.receive, send)
        finally:
            service.active -= 1

    def _refusal(self, scope: Scope, body: _Body) -> ApiError | None:
        settings, path = self._service.settings, scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in settings.cors and "*" not in settings.cors:
            problem = f"web pages of {origin!r:.80} may not ask; the server's --cors allows them"
            return ApiError(403, problem, "permission_error")
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        if settings.api_key is not None and not _has_key(headers, settings.api_key):
            problem = "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
            return ApiError(401, problem, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._service.active >= settings.max_connections:
            problem = f"{self._service.active} requests are being answered, no more are taken at once"
            return ApiError(503, problem, UNAVAILABLE, headers={"Retry-After": "1"})
        return None


def _has_key(headers: Mapping[bytes, bytes], key: str) -> bool:
    bearer = headers.get(b"authorization", b"")
    given = bearer[7:].strip() if bearer[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
    return hmac.compare_digest(given, key.encode())


async def _refuse(scope: Scope, send: Send, error: ApiError) -> None:
    content = dump(error_body(scope["path"], error))
    headers = {"content-type": "application/json", "content-length": str(len(content))} | error.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


class _Body:
    """A request's body, counted as it comes in."""

    def __init__(self, receive: Receive, most: int, patience: float) -> None:
        self._receive, self._most, self._patience = receive, most, patience
        self._count, self._done = 0, False

    async def receive(self) -> Message:
        """The next message. Raises `ApiError` 413 for a body that is too long, 408 where the next piece does not
        come."""
        if self._done:
            return await self._receive()
        try:
            async with asyncio.timeout(self._patience):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, f"no more of the body came for {self._patience:g} s", "timeout_error") from error
        self._count += len(message.get("body", b""))
        self._done = not message.get("more_body", False)
        if self._count > self._most:
            await self._drain()
            problem = f"the body has more than {self._most:,} bytes, which is the most that is taken; cut it"
            raise ApiError(413, problem, code="request_too_large")
        return message

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._done and self._count < _DRAIN_BYTES:
                    message = await self._receive()
                    self._count += len(message.get("body", b""))
                    self._done = not message.get("more_body", False)
        except TimeoutError:
            pass
