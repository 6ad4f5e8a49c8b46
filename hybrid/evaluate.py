"""Quality of each strategy held against dense: perplexity, KL divergence and top-1 agreement.

Every token of a window is treated as in decode, through the kernels that decode uses, whatever the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp

import torch

from hybrid.ffn import FFNCounters, FFNRuntime, Strategy
from hybrid.model import Transformer
from profiler.corpus import TokenWindows

_LOGIT_ROWS = 256  # logits held at a time: 256 x 32000 x 4 bytes are 33 MB


@dataclass(frozen=True)
class StrategyQuality:
    """One strategy over a corpus; `kl` is in nats per token, dense first; shares are of all FFN neurons.

    `fired_share` is None for dense, which does not count.
    """

    strategy: Strategy
    tokens: int
    perplexity: float
    kl: float
    top1_agreement: float
    computed_share: float
    fired_share: float | None


@contextmanager
def as_decode(runtime: FFNRuntime, strategy: Strategy) -> Iterator[None]:
    """Inside, every token is treated as in decode with `strategy`; what was set before is put back after.

    Dense is the same for one token and for many, so it takes the faster way, that of prefill.
    """
    before = runtime.strategy, runtime.token_by_token
    runtime.strategy, runtime.token_by_token = strategy, strategy != "dense"
    try:
        yield
    finally:
        runtime.strategy, runtime.token_by_token = before


def perplexity(model: Transformer, runtime: FFNRuntime, strategy: Strategy, windows: TokenWindows) -> float:
    """exp of the mean loss over every predicted token of every window."""
    total, count = 0.0, 0
    with as_decode(runtime, strategy):
        for window in torch.from_numpy(windows.tokens):
            losses, _ = _losses(model, model(window), window)
            total, count = total + float(losses.sum()), count + len(losses)
    return exp(total / max(1, count))


def evaluate(
    model: Transformer,
    runtime: FFNRuntime,
    strategies: Sequence[Strategy],
    windows: TokenWindows,
    progress: Callable[[int], None],
) -> list[StrategyQuality]:
    """Hold `strategies` against dense over `windows`; `progress` is called with tokens done since its last call."""
    sums = {strategy: _Sums() for strategy in strategies}
    for window in torch.from_numpy(windows.tokens):
        with as_decode(runtime, "dense"):
            _, truth = _losses(model, model(window), window)
        for strategy in strategies:
            runtime.counters = FFNCounters()
            with as_decode(runtime, strategy):
                losses, logs = _losses(model, model(window), window)
            sums[strategy].add(truth, losses, logs, runtime.counters)
            progress(len(window))
    return [sums[strategy].result(strategy) for strategy in strategies]


def _losses(model: Transformer, hidden: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each next token [t - 1], and the log-probabilities [t - 1, vocab] that it came from."""
    logs = torch.cat([model.logits(part).log_softmax(-1) for part in hidden[:-1].split(_LOGIT_ROWS)])
    return -logs.gather(1, window[1:, None])[:, 0], logs


@dataclass
class _Sums:
    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    neurons: int = 0
    computed: int = 0
    fired: int = 0

    def add(self, dense: torch.Tensor, losses: torch.Tensor, ours: torch.Tensor, c: FFNCounters) -> None:
        """Count one window: log-probabilities [t, vocab] of dense and of a strategy, and the strategy's losses [t]."""
        self.tokens += len(losses)
        self.loss += float(losses.sum())
        self.kl += float((dense.exp() * (dense - ours)).sum())
        self.agreed += int((dense.argmax(1) == ours.argmax(1)).sum())
        self.neurons, self.computed = self.neurons + c.neurons, self.computed + c.computed
        self.fired += c.fired_hot + c.fired_cold

    def result(self, strategy: Strategy) -> StrategyQuality:
        n, neurons = max(1, self.tokens), max(1, self.neurons)
        return StrategyQuality(
            strategy,
            self.tokens,
            exp(self.loss / n),
            max(0.0, self.kl / n),  # below 0 by rounding only
            self.agreed / n,
            self.computed / neurons if self.neurons else 1.0,
            self.fired / neurons if self.neurons else None,
        )
