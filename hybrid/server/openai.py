"""Words that OpenAI's endpoints share: ids, usage, timings, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from hybrid.generation import GenerationStats
from hybrid.server.answer import Answer
from hybrid.server.token_text import TokenTexts
from hybrid.serving.request import TokenLogprob

DONE = b"data: [DONE]\n\n"  # the last event of a stream
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every object begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """Token counts of all answers; the prompt of `n` answers counts once."""
    stats = [answer.last.stats for answer in answers if answer.last]
    return usage_of(stats[::n], sum(each.generated_tokens for each in stats))


def usage_of(prompts: Iterable[GenerationStats], generated: int) -> dict[str, Any]:
    """Token counts: `prompts` are the counters of one answer to each prompt."""
    pairs = [(each.prompt_tokens, each.cached_tokens) for each in prompts]
    read, cached = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(stats: GenerationStats) -> dict[str, Any]:
    """Where the time of an answer went, in llama.cpp's words; the shares are ours."""
    read, made = stats.prompt_tokens - stats.cached_tokens, stats.generated_tokens
    prompt_ms, made_ms = 1000 * stats.ttft_seconds, 1000 * stats.decode_seconds
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, read),
        "prompt_per_second": 1000 * read / prompt_ms if prompt_ms else 0.0,
        "predicted_n": made,
        "predicted_ms": made_ms,
        "predicted_per_token_ms": made_ms / max(1, made - 1),
        "predicted_per_second": stats.tokens_per_second,
        "active_share": stats.active_share,
        "hot_share": stats.hot_share,
    }


def finite(logprob: float | None) -> float | None:
    """A log-probability as JSON can hold it."""
    return None if logprob is None else max(_LEAST_LOGPROB, logprob)


def chat_logprobs(found: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Of a chat's answer: each token with its bytes and the likeliest in its place."""
    content = [
        {
            **_token(each.token, each.logprob, texts),
            "top_logprobs": [_token(token, logprob, texts) for token, logprob in each.top],
        }
        for each in found
    ]
    return {"content": content, "refusal": None}


def _token(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text_of(token), "logprob": finite(logprob), "bytes": list(texts.bytes_of(token))}


def completion_logprobs(found: Sequence[TokenLogprob], texts: TokenTexts, start: int = 0) -> dict[str, Any]:
    """Of a completion: parallel lists. start: where its first token's text begins.

    top_logprobs is by the tokens' texts; where two have the same, the likelier stays.
    """
    names = [texts.text_of(each.token) for each in found]
    offsets, at = list[int](), start
    for name in names:
        offsets.append(at)
        at += len(name)
    return {
        "tokens": names,
        "token_logprobs": [finite(each.logprob) for each in found],
        "top_logprobs": [_by_text(each, texts) for each in found],
        "text_offset": offsets,
    }


def _by_text(each: TokenLogprob, texts: TokenTexts) -> dict[str, Any] | None:
    """The likeliest tokens and the one that was taken; None for a prompt's first, which nothing comes before."""
    if each.logprob is None:
        return None
    named: dict[str, Any] = {}
    for token, logprob in (*each.top, (each.token, each.logprob)):
        named.setdefault(texts.text_of(token), finite(logprob))
    return named
