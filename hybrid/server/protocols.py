"""What the server needs of an engine; `AsyncEngine` has it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

from hybrid.formats.text import TextCodec
from hybrid.generation import SamplingSettings
from hybrid.runtime.plan import RunPlan
from hybrid.serving.figures import EngineFigures
from hybrid.serving.request import Constraint, Request, ServedStep, TokenLogprob


class ConstraintMaker(Protocol):
    """Makes constraints, on any thread. Both raise `InputError` for a schema that cannot be used."""

    def json_schema(self, schema: Mapping[str, Any]) -> Constraint:
        """For JSON of this schema."""

    def tool_call(self, tools: Mapping[str, Mapping[str, Any]]) -> Constraint:
        """For {"name": ..., "arguments": {...}}: a call of one of the tools, schemas of arguments by name."""


class ServingEngine(Protocol):
    """A loaded model that gives many answers at once, on the thread of one event loop."""

    name: str
    codec: TextCodec
    settings: SamplingSettings
    end_tokens: frozenset[int]

    @property
    def plan(self) -> RunPlan:
        """How the model runs on this machine."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    def failure(self) -> BaseException | None:
        """Why the engine ended, None while it lives."""

    def generate(self, request: Request) -> AsyncGenerator[ServedStep, None]:
        """One step per token; closing it cancels the request.

        Raises `QueueFullError`, `InputError` at the first step; `DeadlineError`, `EngineStoppedError` later.
        """

    @property
    def constraints(self) -> ConstraintMaker:
        """Makes the constraints of requests. Raises `InputError` where the package for it is missing."""

    async def score(self, prompt: Sequence[int], top: int = 0, deadline: float | None = None) -> list[TokenLogprob]:
        """The log-probability of each token of `prompt`, and the `top` likeliest in its place; `DeadlineError` where
        that takes more than `deadline` seconds."""

    def figures(self) -> EngineFigures:
        """Counters and gauges so far."""

    def on_failure(self, call: Callable[[BaseException], None]) -> None:
        """Have `call` called, on whatever thread, when the engine ends by an error."""

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests; finish what runs within `grace` seconds, cancel the rest."""
