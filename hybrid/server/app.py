"""`create_app`: the routes of the server over a `Service`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from hybrid.server import bodies, native
from hybrid.server.chat import chat_completions
from hybrid.server.completions import completions
from hybrid.server.errors import ApiError, ClientGoneError, as_api_error, error_body
from hybrid.server.guard import Guard
from hybrid.server.messages import count_tokens, messages
from hybrid.server.responses import responses
from hybrid.server.schema import describe
from hybrid.server.service import Service
from hybrid.server.wire import json_response

_LOG = logging.getLogger(__name__)
Handler = Callable[[Service, Request], Awaitable[Response]]
_POSTS: tuple[tuple[str, Handler, type[bodies.Body]], ...] = (
    ("/v1/chat/completions", chat_completions, bodies.ChatBody),
    ("/v1/completions", completions, bodies.CompletionBody),
    ("/v1/responses", responses, bodies.ResponsesBody),
    ("/v1/messages", messages, bodies.MessagesBody),
    ("/v1/messages/count_tokens", count_tokens, bodies.CountBody),
    ("/tokenize", native.tokenize, bodies.TokenizeBody),
    ("/detokenize", native.detokenize, bodies.DetokenizeBody),
)
_GETS: tuple[tuple[str, Handler], ...] = (
    ("/health", native.health),
    ("/v1/health", native.health),
    ("/v1/models", native.models),
    ("/v1/models/{model:path}", native.model),
    ("/props", native.props),
    ("/metrics", native.metrics),
)


def create_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application. Lifespan and websockets it has none."""
    app = FastAPI(title="hybrid", docs_url=None, redoc_url=None, redirect_slashes=False)
    for path, handler in _GETS:
        app.add_api_route(path, _route(service, handler), methods=["GET"], response_model=None)
    for path, handler, _ in _POSTS:
        app.add_api_route(path, _route(service, handler), methods=["POST"], response_model=None)
    app.openapi = lambda: describe(app, {path: body for path, _, body in _POSTS})  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _unknown)
    guarded: ASGIApp = Guard(app, service)
    if service.settings.cors:
        guarded = CORSMiddleware(
            guarded, allow_origins=service.settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


def _route(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        try:
            return await handler(service, request)
        except ClientGoneError:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - every failure is answered, in the API's shape
            said = as_api_error(service.broken(error))
            if said.status == 500:
                _LOG.error("%s %s: %s", request.method, request.url.path, said.message)
            return _said(request, said)

    route.__name__ = handler.__name__
    route.__doc__ = handler.__doc__
    return route


async def _unknown(request: Request, error: Any) -> Response:
    """What the router refuses: an unknown path, or a method that a path has not."""
    words = {404: f"there is no {request.url.path!r:.80} here", 405: f"{request.method} is not for this path"}
    said = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers)
    return _said(request, said)


def _said(request: Request, error: ApiError) -> Response:
    return json_response(error_body(request.url.path, error), error.status, error.headers)
