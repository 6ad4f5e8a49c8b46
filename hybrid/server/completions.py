"""`POST /v1/completions`: goes on with texts or tokens. `echo` gives the prompt back, with `logprobs` its score too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from fastapi import Request, Response

from hybrid.generation import GenerationStats
from hybrid.server.answer import Answer, Delta, Wanted, collect, deltas_of
from hybrid.server.bodies import MOST_CHOICES, CompletionBody
from hybrid.server.errors import ApiError, as_api_error, error_body
from hybrid.server.openai import DONE, completion_logprobs, head, timings, usage, usage_of
from hybrid.server.protocols import ServingEngine
from hybrid.server.sampling import logit_bias_of, schema_of, settings_of
from hybrid.server.service import Service
from hybrid.server.token_text import TokenTexts
from hybrid.server.wire import event, json_response, read_body, stream, while_connected
from hybrid.serving.request import TokenLogprob

_DEFAULT_TOKENS = 16  # as OpenAI has it


@dataclass(frozen=True)
class _Echo:
    """What comes before each answer: the prompt's text, and the scores of its tokens where they are asked for."""

    text: str = ""
    scores: tuple[TokenLogprob, ...] = ()


async def completions(service: Service, request: Request) -> Response:
    """Go on with a text."""
    body = await read_body(request, CompletionBody)
    engine = service.ready()
    wanted, started = await asyncio.to_thread(_wanted, engine, body), perf_counter()
    async with while_connected(request.receive):
        echoes = await _echoes(engine, body, wanted.prompts)
    if body.max_tokens == 0:
        return json_response(_whole(engine, body, wanted, echoes, [Answer() for _ in range(wanted.count)]))
    deltas = deltas_of(engine, wanted.after(perf_counter() - started) if body.echo else wanted)
    if body.stream:
        return await stream(request, _chunks(service, body, wanted, echoes, deltas), service.settings.patience)
    async with while_connected(request.receive):
        answers = await collect(deltas, wanted.count)
    return json_response(_whole(engine, body, wanted, echoes, answers))


def _wanted(engine: ServingEngine, body: CompletionBody) -> Wanted:
    """What `body` asks for. Tokenises: for a thread of its own. Raises `ApiError` or `InputError`."""
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo", param="max_tokens")
    if body.max_tokens == 0 and body.stream:
        raise ApiError(400, "max_tokens is 0, which has nothing to stream", param="stream")
    if body.suffix:
        raise ApiError(400, "suffix: text is only gone on with here, not filled in", param="suffix")
    prompts = _prompts(body.prompt)
    if len(prompts) * (body.n or 1) > MOST_CHOICES:
        problem = f"{len(prompts)} prompts with {body.n or 1} answers each, at most {MOST_CHOICES} answers are given"
        raise ApiError(400, f"{problem} at once; ask in parts", param="prompt")
    most = _DEFAULT_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    return Wanted(
        tuple(tuple(engine.codec.encode_prompt(prompt, engine.context)) for prompt in prompts),
        settings_of(body, engine.settings, most, body.stop, body.seed),
        body.n or 1,
        body.frequency_penalty or 0.0,
        body.presence_penalty or 0.0,
        logit_bias_of(body),
        body.logprobs,
        schema_of(body.response_format, "response_format"),
        deadline=body.timeout,
    )


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    """One prompt, text or tokens, or several. Raises `ApiError` for none."""
    if not given and given != "":
        raise ApiError(400, "prompt is an empty list, expected a text, tokens, or a list of these", param="prompt")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


async def _echoes(engine: ServingEngine, body: CompletionBody, prompts: Sequence[Sequence[int]]) -> list[_Echo]:
    """Of each prompt. Raises as `score` does."""
    if not body.echo:
        return [_Echo()] * len(prompts)
    given = _prompts(body.prompt)
    texts = [text if isinstance(text, str) else engine.codec.decode(text) for text in given]
    if body.logprobs is None:
        return [_Echo(text) for text in texts]
    scores = await asyncio.gather(*(engine.score(prompt, body.logprobs, body.timeout) for prompt in prompts))
    return [_Echo(text, tuple(found)) for text, found in zip(texts, scores, strict=True)]


def _whole(
    engine: ServingEngine, body: CompletionBody, wanted: Wanted, echoes: list[_Echo], answers: list[Answer]
) -> dict[str, Any]:
    texts, choices = TokenTexts(engine.codec), []
    for index, answer in enumerate(answers):
        echo = echoes[index // wanted.n]
        found = [*echo.scores, *answer.logprobs]
        choices.append(
            {
                "index": index,
                "text": echo.text + answer.text,
                "logprobs": None if body.logprobs is None else completion_logprobs(found, texts),
                "finish_reason": answer.last.finish if answer.last else "length",
            }
        )
    last = answers[0].last
    counts = usage(answers, wanted.n) if last else usage_of([GenerationStats(len(p)) for p in wanted.prompts], 0)
    whole = head("text_completion", "cmpl", engine.name) | {"choices": choices, "usage": counts}
    return whole | ({"timings": timings(last.stats)} if last else {})


async def _chunks(
    service: Service,
    body: CompletionBody,
    wanted: Wanted,
    echoes: list[_Echo],
    deltas: AsyncGenerator[Delta, None],
) -> AsyncGenerator[bytes, None]:
    engine = service.ready()
    begun, texts = head("text_completion", "cmpl", engine.name), TokenTexts(engine.codec)
    last, lengths = dict[int, GenerationStats](), dict[int, int]()
    usage_null = {"usage": None} if body.wants_usage else {}
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                echo = _Echo() if delta.index in last else echoes[delta.index // wanted.n]
                last[delta.index] = delta.stats
                text, found = echo.text + delta.text, [*echo.scores, *([delta.logprob] if delta.logprob else [])]
                start = lengths.get(delta.index, 0)
                logprobs = None if body.logprobs is None else completion_logprobs(found, texts, start)
                lengths[delta.index] = start + sum(len(name) for name in logprobs["tokens"]) if logprobs else 0
                choice = {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish}
                timed = {"timings": timings(delta.stats)} if delta.finish else {}
                if text or logprobs or delta.finish:
                    yield event(begun | {"choices": [choice]} | usage_null | timed)
    except Exception as error:
        if not last:  # nothing was sent: the answer can have a status of its own
            raise
        yield event(error_body("", as_api_error(service.broken(error))))
        return
    if body.wants_usage:
        prompts = [last[index] for index in range(0, wanted.count, wanted.n)]
        counts = usage_of(prompts, sum(stats.generated_tokens for stats in last.values()))
        yield event(begun | {"choices": [], "usage": counts})
    yield DONE
