"""The OpenAPI description: what FastAPI knows of the routes, and the bodies that they read themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from hybrid.server.bodies import Body

_ERRORS = {
    "400": "The request is wrong; the message says what.",
    "401": "No valid API key.",
    "403": "Web pages of this origin may not ask.",
    "404": "There is no such thing.",
    "408": "The body did not come, or the answer was not finished within its timeout.",
    "413": "The body is too long.",
    "429": "Too many requests wait.",
    "500": "A failure here.",
    "503": "Loading, ending or overloaded.",
}


def describe(app: FastAPI, posts: Mapping[str, type[Body]]) -> dict[str, Any]:
    """The description of `app`, of which the paths of `posts` read such bodies."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    places, shared = models_json_schema(
        [(body, "validation") for body in posts.values()], ref_template="#/components/schemas/{model}"
    )
    found.setdefault("components", {}).setdefault("schemas", {}).update(shared["$defs"])
    for path, body in posts.items():
        content = {"application/json": {"schema": places[(body, "validation")]}}
        found["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    refused = {status: {"description": text, "content": {"application/json": {}}} for status, text in _ERRORS.items()}
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"] = {"200": {"description": "Done."}} | refused
    app.openapi_schema = found
    return found
