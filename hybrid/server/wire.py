"""HTTP and SSE below the APIs: bodies in, JSON and events out, and clients that go away.

Everything here runs on the event loop; bodies of more than `_LARGE` bytes are parsed on another thread. A client that
does not read makes `send` wait, and with it the generator of its events: nobody else's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from hybrid.server.errors import ApiError, ClientGoneError

_LARGE = 2**16
BodyType = TypeVar("BodyType", bound=BaseModel)


def dump(content: Any) -> bytes:
    """JSON in UTF-8; what is no Unicode becomes a question mark."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as the whole answer."""
    return Response(dump(content), status, headers, media_type="application/json")


async def read_body(request: Request, kind: type[BodyType]) -> BodyType:
    """The request's JSON as a `kind`. Raises `ApiError` 400 that names the first field that is wrong."""
    data = await request.body()
    try:
        if len(data) > _LARGE:
            return await asyncio.to_thread(kind.model_validate_json, data)
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid" or not first["loc"]:
        return ApiError(400, f"the body is not a JSON object that can be read: {first['msg']}")
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    return ApiError(400, f"{place}: {first['msg']}", param=place)


def _is_branch(part: int | str) -> bool:
    """Whether `part` of a place names one of several types that a value may have, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Inside, the client's going away raises `ClientGoneError`, once the request's body was read."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()


class EventStream(Response):
    """Server-sent events, as they come; the generator is closed at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], patience: float) -> None:
        """first: the first piece; patience: seconds that the client may leave a piece unread."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._patience = first, rest, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, as ASGI has it."""
        async with aclosing(self._rest):
            try:
                async with while_connected(receive):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await self._piece(send, self._first)
                    async for piece in self._rest:
                        await self._piece(send, piece)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (ClientGoneError, TimeoutError):
                return

    async def _piece(self, send: Send, piece: bytes) -> None:
        async with asyncio.timeout(self._patience):
            await send({"type": "http.response.body", "body": piece, "more_body": True})


async def stream(request: Request, events: AsyncGenerator[bytes, None], patience: float) -> EventStream:
    """`events` as an answer that begins with the first of them: what fails before has a status of its own."""
    try:
        async with while_connected(request.receive):
            first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, patience)


def event(content: Any, name: str | None = None) -> bytes:
    """One event, of a name where the API gives them names."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + dump(content) + b"\n\n"
