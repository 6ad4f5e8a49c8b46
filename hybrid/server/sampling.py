"""The fields of requests that say how tokens are picked, to `SamplingSettings` and their kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybrid.errors import InputError
from hybrid.generation import SamplingSettings
from hybrid.server.bodies import OpenAIBody, Sampled
from hybrid.server.errors import ApiError

_LEAST_TEMPERATURE, _LEAST_TOP_P = 1e-3, 1e-6  # of our settings; less is greedy, or as good as greedy


def settings_of(
    body: Sampled, model: SamplingSettings, most: int | None, stop: str | Sequence[str] | None, seed: int | None = None
) -> SamplingSettings:
    """The model's own settings, with what the request says. most: new tokens. Raises `ApiError` for stop strings that
    are none."""
    said: dict[str, Any] = {
        "temperature": None if body.temperature is None else _temperature(body.temperature),
        "top_p": None if body.top_p is None else max(_LEAST_TOP_P, body.top_p),
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "seed": None if seed is None else seed % 2**63,
        "max_new_tokens": most,
        "stop": None if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
    }
    try:
        return replace(model, **{name: value for name, value in said.items() if value is not None})
    except InputError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error


def _temperature(value: float) -> float:
    return value if value >= _LEAST_TEMPERATURE else 0.0


def logit_bias_of(body: OpenAIBody) -> dict[int, float]:
    """Token ids with what is added to their logits. Raises `ApiError` for what is no token's id or too much."""
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and abs(value) <= 100):
            expected = "expected token ids with numbers from -100 to 100"
            raise ApiError(400, f"logit_bias has {token!r:.40}: {value:g}, {expected}", param="logit_bias")
        bias[int(token)] = value
    return bias


def schema_of(form: Mapping[str, Any] | None, param: str) -> Mapping[str, Any] | None:
    """The JSON schema that an answer must fit; None for plain text.

    `form` is a `response_format` of chats, or a `text.format` of responses, where the schema lies one level higher.
    Raises `ApiError` for any other.
    """
    kind = form.get("type") if form else "text"
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    within = form.get("json_schema", form)
    schema = within.get("schema") if isinstance(within, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        expected = "expected text, json_object, or json_schema with a schema"
        raise ApiError(400, f"{param} is of type {kind!r:.40}, {expected}", param=param)
    return schema
