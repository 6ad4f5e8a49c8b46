"""Quality of each strategy held against dense: perplexity, KL divergence and top-1 agreement.

Every token of a window is treated as in decode, through the kernels that decode uses, whatever the strategy. Keys and
values stay in f32, unless what keeping them in another type costs is to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp

import torch

from cpu_kernels.contract import Precision
from cpu_kernels.gemm import GemmScratch
from hybrid.model.ffn import FFNCounters, FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Transformer
from profiler.common.openmp import torch_threads
from profiler.common.spec import KVChoice, Strategy
from profiler.corpus import TokenWindows

_LOGIT_ROWS = 256  # logits held at a time: 256 x 32000 x 4 bytes are 33 MB


@dataclass(frozen=True)
class StrategyQuality:
    """One strategy over a corpus; `kl` is in nats per token, dense first; shares are of all FFN neurons.

    `fired_share` is None for dense, which does not count. `kv`: what keys and values were kept in,
    None for f32, as computed. prefill: how many tokens at once were multiplied.
    """

    strategy: Strategy
    tokens: int
    perplexity: float
    kl: float
    top1_agreement: float
    computed_share: float
    fired_share: float | None
    kv: str | None = None
    prefill: Precision = "precise"


@contextmanager
def as_decode(runtime: FFNRuntime, strategy: Strategy) -> Iterator[None]:
    """Inside, every token is treated as in decode with `strategy`; what was set before is put back after.

    Dense is the same for one token and for many, so it takes the faster way, that of prefill.
    """
    before = runtime.strategy, runtime.as_decode
    runtime.strategy, runtime.as_decode = strategy, strategy != "dense"
    try:
        yield
    finally:
        runtime.strategy, runtime.as_decode = before


def perplexity(model: Transformer, runtime: FFNRuntime, strategy: Strategy, windows: TokenWindows) -> float:
    """exp of the mean loss over every predicted token of every window."""
    sums = _Sums()
    with torch_threads(1), as_decode(runtime, strategy):
        for window in torch.from_numpy(windows.tokens):
            hidden = model(window)
            sums.add(model, hidden, hidden, window)
    return exp(sums.loss / max(1, sums.tokens))


def evaluate(
    model: Transformer,
    runtime: FFNRuntime,
    strategies: Sequence[Strategy],
    windows: TokenWindows,
    progress: Callable[[int], None],
    kv: KVChoice = "auto",
    prefill: Precision = "precise",
) -> list[StrategyQuality]:
    """Hold `strategies` against dense over `windows`; `progress` is called with tokens done since its last call.

    kv: other than `auto`, all strategies read keys and values that are kept so; first is then dense with them in f32.
    prefill: `fast` adds dense as prompts are read then, last.
    """
    sums, plain = {strategy: _Sums() for strategy in strategies}, _Sums()
    spec = replace(model.spec, kv=kv)
    cache = None if kv == "auto" else KVCache(spec, windows.tokens.shape[1])
    fast, exactly = _Sums() if prefill == "fast" else None, runtime.gemm
    rounding = GemmScratch(runtime.pool.threads, "fast")
    with torch_threads(1):
        for window in torch.from_numpy(windows.tokens):
            with as_decode(runtime, "dense"):
                truth = model(window)
            if cache is not None:
                plain.add(model, truth, truth, window)
            for strategy in strategies:
                runtime.counters = FFNCounters()
                with as_decode(runtime, strategy):
                    if cache is not None:
                        cache.truncate(0)
                    is_truth = strategy == "dense" and cache is None
                    sums[strategy].add(model, truth, truth if is_truth else model(window, cache), window)
                sums[strategy].count(runtime.counters)
                progress(len(window))
            if fast is not None:
                runtime.gemm = rounding
                with as_decode(runtime, "dense"):
                    fast.add(model, truth, model(window), window)
                runtime.gemm = exactly
    found = [] if cache is None else [plain.result("dense")]
    found += [sums[strategy].result(strategy, None if cache is None else spec.kv_dtype) for strategy in strategies]
    return found if fast is None else [*found, replace(fast.result("dense"), prefill="fast")]


@dataclass
class _Sums:
    """Sums over predicted tokens and, from the FFN's counters, over neurons."""

    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    neurons: int = 0
    computed: int = 0
    fired: int = 0

    def add(self, model: Transformer, truth: torch.Tensor, ours: torch.Tensor, window: torch.Tensor) -> None:
        """Final hidden states [t, d] of dense and of a strategy; logits are made of `_LOGIT_ROWS` of them at a time."""
        targets = window[1:].split(_LOGIT_ROWS)
        for true, found, target in zip(
            truth[:-1].split(_LOGIT_ROWS), ours[:-1].split(_LOGIT_ROWS), targets, strict=True
        ):
            logs = model.logits(found).log_softmax(-1)
            dense = logs if ours is truth else model.logits(true).log_softmax(-1)
            self.tokens += len(target)
            self.loss -= float(logs.gather(1, target[:, None]).sum())
            self.kl += float((dense.exp() * (dense - logs)).sum())
            self.agreed += int((dense.argmax(1) == logs.argmax(1)).sum())

    def count(self, counters: FFNCounters) -> None:
        self.neurons += counters.neurons
        self.computed += counters.computed
        self.fired += counters.fired

    def result(self, strategy: Strategy, kv: str | None = None) -> StrategyQuality:
        n, neurons = max(1, self.tokens), max(1, self.neurons)
        return StrategyQuality(
            strategy,
            self.tokens,
            exp(self.loss / n),
            max(0.0, self.kl / n),  # below 0 by rounding only
            self.agreed / n,
            self.computed / neurons if self.neurons else 1.0,
            self.fired / neurons if self.neurons else None,
            kv,
        )
