"""Many texts continued side by side, each a row of one step: what a model says by itself, to learn from or to judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import SHARED_BLOCK_SIZE, KVCache, KVPool, Row
from hybrid.model.transformer import Transformer
from hybrid.runtime.runner import CpuRunner
from hybrid.runtime.sampling import Sampler
from profiler.common.spec import Strategy

AT_ONCE = 16  # texts, or as many as have their keys and values in so many bytes
KV_BYTES = 1 << 30


def continued(
    model: Transformer,
    runtime: FFNRuntime,
    strategy: Strategy,
    prompts: np.ndarray,
    length: int,
    settings: SamplingSettings,
    advance: Callable[[int], None],
) -> np.ndarray:
    """int64 [n, length]: `prompts`, int64 [n, p] of 1 <= p < length tokens, and what the model makes of them.

    An end token ends nothing: another text follows it, as in packed windows. Text n is drawn by `settings.seed` + n;
    which others are made beside it changes nothing. Prompts are read dense. `advance` is told of tokens as they are
    made. Raises `ContextError` for a length that the model does not take.
    """
    found = np.empty((len(prompts), length), np.int64)
    found[:, : prompts.shape[1]] = prompts
    block = min(SHARED_BLOCK_SIZE, length)
    each = model.spec.n_layers * model.spec.kv_bytes_per_layer(length)
    count = min(AT_ONCE, len(prompts), max(1, KV_BYTES // each))
    pool = KVPool(model.spec, count * -(-length // block) * block, block)
    caches = [KVCache(model.spec, length, pool) for _ in range(count)]
    before = runtime.strategy, runtime.as_decode
    runtime.strategy = strategy
    try:
        runner = CpuRunner(model, caches[0], runtime)
        runner.load_kernels()
        for start in range(0, len(prompts), count):
            texts = found[start : start + count]
            samplers = [Sampler(_of_text(settings, start + n)) for n in range(len(texts))]
            _fill(runner, caches, texts, prompts.shape[1], samplers, advance)
    finally:
        runtime.strategy, runtime.as_decode = before
    return found


def _of_text(settings: SamplingSettings, number: int) -> SamplingSettings:
    return replace(settings, seed=None if settings.seed is None else settings.seed + number)


def _fill(
    runner: CpuRunner,
    caches: Sequence[KVCache],
    texts: np.ndarray,
    known: int,
    samplers: Sequence[Sampler],
    advance: Callable[[int], None],
) -> None:
    """Write the tokens of `texts` int64 [n, length] from `known` on, each by a cache, whose contents are lost."""
    count, length = texts.shape
    caches = caches[:count]
    for text, cache, sampler in zip(texts, caches, samplers, strict=True):
        cache.truncate(0)
        cache.reserve_or_raise(length)
        text[known] = sampler.pick(runner.read(text[:known].tolist(), length, cache))
    advance(count)
    for at in range(known + 1, length):
        rows = [Row(cache, token) for cache, token in zip(caches, texts[:, at - 1].tolist(), strict=True)]
        texts[:, at] = runner.next_tokens(rows, samplers)
        advance(count)
