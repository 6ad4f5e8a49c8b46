"""What goes wrong, as the APIs say it: a status, and a body of the shape that the client knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import ContextError, InputError
from hybrid.serving.request import DeadlineError, EngineStoppedError, QueueFullError

INVALID, UNAVAILABLE, SERVER = "invalid_request_error", "unavailable_error", "server_error"
_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that is refused or failed.

    status: of HTTP. kind: OpenAI's `type`. param: the field that is wrong. code: OpenAI's word for it, if there is one.
    headers: what the answer has besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client went away; nobody reads an answer."""


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of `error`."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            wait = {"Retry-After": str(max(1, round(error.retry_after)))}
            return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=wait)
        case ContextError():
            return ApiError(400, str(error), param="messages", code="context_length_exceeded")
        case InputError():
            return ApiError(400, str(error), param=error.setting)
        case DeadlineError():
            once = {"X-Should-Retry": "false"}  # clients would wait as long again
            return ApiError(408, str(error), "timeout_error", param="timeout", code="timeout", headers=once)
        case EngineStoppedError():
            return ApiError(503, str(error), UNAVAILABLE, headers={"Retry-After": "5"})
        case _:
            return ApiError(500, f"{type(error).__name__}: {error}", SERVER)


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The body for a request to `path`: Anthropic's shape under /v1/messages, elsewhere OpenAI's."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else INVALID)
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    said = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": said}
