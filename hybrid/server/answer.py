"""The one call that all APIs are translations of: `Wanted` in, `Delta` by `Delta` out.

Several answers of one request run at once, each on a task of its own; one that is not read waits after `_AHEAD` deltas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hybrid.generation import GenerationStats, SamplingSettings
from hybrid.server.calls import CallPiece, CallReader
from hybrid.server.protocols import ServingEngine
from hybrid.server.tools import Toolbox
from hybrid.serving.request import Constraint, DeadlineError, Request, TokenLogprob

Finish = Literal["stop", "length", "tool_calls"]
_AHEAD = 16


@dataclass(frozen=True)
class Wanted:
    """Answers that are wanted: `n` of each of `prompts`, token ids. schema: a JSON schema that they must fit. deadline:
    seconds after which they are given up."""

    prompts: tuple[tuple[int, ...], ...]
    settings: SamplingSettings
    n: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    tools: Toolbox = field(default_factory=Toolbox)
    deadline: float | None = None

    @property
    def count(self) -> int:
        """How many answers there will be."""
        return len(self.prompts) * self.n

    def request(self, index: int, engine: ServingEngine) -> Request:
        """What the engine is asked for answer `index`; a seed is that of the first, counted up. Takes milliseconds
        where there is a schema. Raises `InputError`."""
        seed = self.settings.seed
        settings = self.settings if seed is None else replace(self.settings, seed=(seed + index % self.n) % 2**63)
        return Request(
            self.prompts[index // self.n],
            settings,
            self.frequency_penalty,
            self.presence_penalty,
            self.logit_bias,
            self.top_logprobs,
            self._constraint(engine),
            self.deadline,
        )

    def after(self, seconds: float) -> Wanted:
        """The same, `seconds` later. Raises `DeadlineError` where that is too late."""
        if self.deadline is None:
            return self
        if seconds >= self.deadline:
            raise DeadlineError(f"not finished within {self.deadline:g} s, its deadline")
        return replace(self, deadline=self.deadline - seconds)

    def _constraint(self, engine: ServingEngine) -> Constraint | None:
        if self.tools.forced:
            return engine.constraints.tool_call({tool.name: tool.schema for tool in self.tools.forced})
        return None if self.schema is None else engine.constraints.json_schema(self.schema)


@dataclass(frozen=True)
class Delta:
    """What one more token adds to answer `index`. finish, and stop_text where a stop string was found: the last one."""

    index: int
    token: int
    text: str
    stats: GenerationStats
    calls: tuple[CallPiece, ...] = ()
    logprob: TokenLogprob | None = None
    finish: Finish | None = None
    stop_text: str | None = None


@dataclass
class Answer:
    """The deltas of one answer, taken together. calls: name, id and arguments of each."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    calls: list[dict[str, str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Take in the next one."""
        self.text += delta.text
        self.tokens.append(delta.token)
        self.logprobs += [delta.logprob] if delta.logprob else []
        for piece in delta.calls:
            if piece.name is not None:
                self.calls.append({"id": piece.id or "", "name": piece.name, "arguments": ""})
            self.calls[piece.index]["arguments"] += piece.arguments
        self.last = delta


async def collect(deltas: AsyncGenerator[Delta, None], count: int) -> list[Answer]:
    """All `count` answers, whole."""
    answers = [Answer() for _ in range(count)]
    async with aclosing(deltas):
        async for delta in deltas:
            answers[delta.index].add(delta)
    return answers


async def deltas_of(engine: ServingEngine, wanted: Wanted) -> AsyncGenerator[Delta, None]:
    """The deltas of all answers, in the order in which they come. Closing it cancels what is not done."""
    requests = await asyncio.to_thread(lambda: [wanted.request(index, engine) for index in range(wanted.count)])
    if wanted.count == 1:
        async with aclosing(_one(engine, wanted, requests[0], 0)) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_AHEAD)
    runs = [asyncio.create_task(_into(queue, _one(engine, wanted, request, at))) for at, request in enumerate(requests)]
    try:
        left = wanted.count
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            left -= found is None
            if found is not None:
                yield found
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def _into(queue: asyncio.Queue[Delta | Exception | None], deltas: AsyncGenerator[Delta, None]) -> None:
    """All deltas, then None, or why there are no more."""
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                await queue.put(delta)
    except Exception as error:  # noqa: BLE001 - raised where the queue is read
        await queue.put(error)
    else:
        await queue.put(None)


async def _one(engine: ServingEngine, wanted: Wanted, request: Request, index: int) -> AsyncGenerator[Delta, None]:
    reader, tokens = CallReader(wanted.tools.names), list[int]()
    async with aclosing(engine.generate(request)) as steps:
        async for served in steps:
            step = served.step
            tokens.append(step.token)
            text, calls = reader.push(step.text)
            delta = Delta(index, step.token, text, step.stats, tuple(calls), served.logprob)
            if step.finish is None:
                yield delta
                continue
            stop = _stop_text(engine, request, tokens) if step.finish == "stop" else None
            finish: Finish = "stop" if step.finish == "stop" else "length"
            finish = "tool_calls" if finish == "stop" and reader.calls else finish
            yield replace(delta, text=text + reader.rest(), finish=finish, stop_text=stop)


def _stop_text(engine: ServingEngine, request: Request, tokens: list[int]) -> str | None:
    """The stop string that ended an answer, None where an end token did."""
    if not request.settings.stop or tokens[-1] in engine.end_tokens:
        return None
    text = engine.codec.decode(tokens)
    found = [(at, stop) for stop in request.settings.stop if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
