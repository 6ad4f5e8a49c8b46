"""The small endpoints: health, models, properties, metrics, tokens and text. Names and shapes are llama.cpp's."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import Request, Response

from hybrid.server.bodies import DetokenizeBody, TokenizeBody
from hybrid.server.errors import ApiError
from hybrid.server.metrics import CONTENT_TYPE, exposition
from hybrid.server.protocols import ServingEngine
from hybrid.server.service import Service
from hybrid.server.token_text import TokenTexts
from hybrid.server.wire import json_response, read_body
from profiler.common.artifact import package_version


async def health(service: Service, request: Request) -> Response:
    """Whether requests are taken now; needs no key."""
    service.ready()
    return json_response({"status": "ok"})


async def models(service: Service, request: Request) -> Response:
    """The one model that is served."""
    return json_response({"object": "list", "data": [_model(service, service.ready())]})


async def model(service: Service, request: Request) -> Response:
    """The model by its name."""
    engine, name = service.ready(), request.path_params["model"]
    if name != engine.name:
        raise ApiError(404, f"the model {name!r:.80} is not served here, {engine.name!r} is", code="model_not_found")
    return json_response(_model(service, engine))


def _model(service: Service, engine: ServingEngine) -> dict[str, Any]:
    size = {"n_vocab": engine.codec.tokenizer.get_vocab_size(), "n_ctx": engine.context}
    return {"id": engine.name, "object": "model", "created": service.started, "owned_by": "hybrid", "meta": size}


async def props(service: Service, request: Request) -> Response:
    """What the server runs, and how by default."""
    engine = service.ready()
    settings = {name: value for name, value in asdict(engine.settings).items() if name != "seed"}
    special = engine.codec.special_texts
    return json_response(
        {
            "default_generation_settings": {"n_ctx": engine.context, "params": settings},
            "total_slots": service.settings.slots,
            "model_alias": engine.name,
            "model_path": engine.name,
            "chat_template": engine.codec.template_text or "",
            "bos_token": special.get("bos_token", ""),
            "eos_token": special.get("eos_token", ""),
            "build_info": f"hybrid {package_version()}",
            "plan": engine.plan.summary(),
        }
    )


async def metrics(service: Service, request: Request) -> Response:
    """Counters and gauges for Prometheus."""
    return Response(exposition(service.ready().figures()), media_type=CONTENT_TYPE)


async def tokenize(service: Service, request: Request) -> Response:
    """Text to token ids."""
    body, engine = await read_body(request, TokenizeBody), service.ready()
    tokens = await asyncio.to_thread(engine.codec.encode, body.content, special=body.add_special)
    if not body.with_pieces:
        return json_response({"tokens": tokens})
    texts = TokenTexts(engine.codec)
    return json_response({"tokens": [{"id": token, "piece": texts.text_of(token)} for token in tokens]})


async def detokenize(service: Service, request: Request) -> Response:
    """Token ids to text."""
    body, engine = await read_body(request, DetokenizeBody), service.ready()
    size = engine.codec.tokenizer.get_vocab_size()
    if max(body.tokens, default=0) >= size:
        raise ApiError(400, f"tokens: {max(body.tokens)} is no token, expected 0 to {size - 1}", param="tokens")
    return json_response({"content": await asyncio.to_thread(engine.codec.decode, body.tokens)})
