"""`Service`: what all routes share. The engine once it is there, and whether the server still takes requests."""

from __future__ import annotations

import time

from hybrid.server.errors import SERVER, UNAVAILABLE, ApiError
from hybrid.server.protocols import ServingEngine
from hybrid.server.settings import ServerSettings


class Service:
    """Lives on the event loop's thread."""

    def __init__(self, settings: ServerSettings, engine: ServingEngine | None = None) -> None:
        """engine: None while the model loads."""
        self.settings, self.engine = settings, engine
        self.started = int(time.time())
        self.stopping = False
        self.active = 0  # requests that are being answered
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """From now on everything is refused for this reason."""
        self.failure = self.failure or error

    def refusal(self) -> ApiError | None:
        """Why no request is taken now, None where it is."""
        failure = self.failure or (self.engine.failure if self.engine else None)
        if failure is not None:
            return ApiError(503, f"the engine stopped: {type(failure).__name__}: {failure}", UNAVAILABLE)
        if self.stopping:
            return ApiError(503, "the server is ending", UNAVAILABLE, headers={"Retry-After": "5"})
        if self.engine is None:
            return ApiError(503, "the model is loading", UNAVAILABLE, headers={"Retry-After": "2"})
        return None

    def ready(self) -> ServingEngine:
        """The engine. Raises `ApiError` where no request is taken now."""
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        assert self.engine is not None
        return self.engine

    def broken(self, error: Exception) -> Exception:
        """`error` of an answer under way, as it is told: 500 where it is because the engine failed."""
        failure = self.failure or (self.engine.failure if self.engine else None)
        if failure is None or isinstance(error, ApiError):
            return error
        return ApiError(500, f"the engine stopped: {type(failure).__name__}: {failure}", SERVER)
