"""An engine that answers at once what a test wants, with the embedded model's tokenizer and no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from hybrid.errors import ContextError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.text import StreamDecoder, TextCodec
from hybrid.generation import GenerationStats, GenerationStep, SamplingSettings
from hybrid.serving.figures import EngineFigures
from hybrid.serving.request import DeadlineError, EngineStoppedError, QueueFullError, Request, ServedStep, TokenLogprob

END = 1
VOCABULARY = 8192


class FakeConstraint:
    """Of a schema that is only kept."""

    is_finished = False

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema

    def allowed(self) -> Any:
        return np.ones(VOCABULARY, bool)

    def accept(self, token: int) -> None:
        pass


class FakeEngine:
    """Says `text` token by token, or what a schema asks for; keeps what it was asked.

    pause: seconds before each token. most: requests at once; more are refused. Once `failure` is set the next token of
    every answer fails. `open` counts answers that are neither finished nor closed.
    """

    name = "fake"

    def __init__(self, text: str = "one two three", pause: float = 0.0, most: int = 1000) -> None:
        self.codec = TextCodec(EMBEDDED_MODEL, VOCABULARY)
        self.settings, self.end_tokens, self.context = SamplingSettings(temperature=0), frozenset({END}), 1024
        self.plan = SimpleNamespace(summary=lambda: "dense; CPU, 1 thread; context 1024")
        self.text, self.pause, self.most = text, pause, most
        self.requests: list[Request] = []
        self.open = self.finished = 0
        self.failure: BaseException | None = None
        self.stopped = self.cancelled = False
        self._calls: list[Callable[[BaseException], None]] = []

    @property
    def constraints(self) -> Any:
        return SimpleNamespace(
            json_schema=FakeConstraint,
            tool_call=lambda tools: FakeConstraint(called(*next(iter(tools.items())))),
        )

    def on_failure(self, call: Callable[[BaseException], None]) -> None:
        self._calls.append(call)

    def fail(self, error: BaseException) -> None:
        """End as a step that raised would end it."""
        self.failure = error
        for call in self._calls:
            call(error)

    async def close(self, grace: float = 0.0) -> None:
        self.stopped, left = True, grace
        while self.open and left > 0:
            await asyncio.sleep(0.01)
            left -= 0.01
        self.cancelled = True

    async def score(self, prompt: Sequence[int], top: int = 0, deadline: float | None = None) -> list[TokenLogprob]:
        await self._wait(deadline, self.pause)
        return [self._logprob(token, top, at) for at, token in enumerate(prompt)]

    async def _wait(self, deadline: float | None, after: float) -> None:
        """One pause, at whose end `after` seconds are over."""
        await asyncio.sleep(self.pause)
        if deadline is not None and after >= deadline:
            raise DeadlineError(f"not finished within {deadline:g} s, its deadline")

    def figures(self) -> EngineFigures:
        zeros = {each.name: 0 for each in fields(EngineFigures)} | {"hot_share": 0.75, "active_share": None}
        known = {"running": self.open, "requests_total": len(self.requests), "prefix_hit_tokens_total": 7}
        return EngineFigures(**zeros | known | {"generated_tokens_total": 42})

    def _logprob(self, token: int, top: int, at: int = 1) -> TokenLogprob:
        likeliest = tuple((other, -0.5 - n) for n, other in enumerate(range(100, 100 + top)))
        return TokenLogprob(token, -0.25 if at else None, likeliest if at else ())

    async def generate(self, request: Request):
        self.requests.append(request)
        if self.stopped:
            raise EngineStoppedError("the engine is closed")
        if self.open >= self.most:
            raise QueueFullError(self.open, 3.0)
        if len(request.prompt) >= self.context:
            raise ContextError(f"a prompt of {len(request.prompt)} tokens", setting="context")
        self.open += 1
        try:
            async for step in self._steps(request):
                yield step
            self.finished += 1
        finally:
            self.open -= 1

    async def _steps(self, request: Request):
        text = self.text
        if isinstance(request.constraint, FakeConstraint):
            text = json.dumps(example(request.constraint.schema))
        tokens = [*self.codec.encode(text), END][: request.settings.max_new_tokens]
        decoder = StreamDecoder(self.codec)
        for count, token in enumerate(tokens, 1):
            await self._wait(request.deadline, count * self.pause)
            if self.failure:
                raise EngineStoppedError("the step thread ended") from self.failure
            if self.cancelled:
                raise EngineStoppedError("the engine is closed")
            last = count == len(tokens)
            finish = None if not last else "stop" if token == END else "length"
            piece = "" if token == END else decoder.push(token)
            stats = GenerationStats(len(request.prompt), 1, count, 0.5, 0.25 * (count - 1), 0.5)
            found = None if request.top_logprobs is None else self._logprob(token, request.top_logprobs)
            yield ServedStep(GenerationStep(piece, token, stats, finish), found)


def called(name: str, schema: Mapping[str, Any]) -> Any:
    return {"type": "object", "properties": {"name": {"const": name}, "arguments": schema}}


def example(schema: Mapping[str, Any]) -> Any:
    """A value that fits `schema`."""
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if "const" in schema:
        return schema["const"]
    if schema.get("type") == "object":
        return {name: example(part) for name, part in schema.get("properties", {}).items()}
    return {"string": "x", "integer": 3, "number": 1.5, "boolean": True, "array": []}.get(schema.get("type", ""), {})
