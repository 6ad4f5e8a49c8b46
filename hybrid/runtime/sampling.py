"""Picking the next token from logits.

A vocabulary is never sorted where a few tokens decide: at 32000 tokens the sort took 2.5 ms and the 40 largest take
0.02; drawing from those instead of all 0.01 instead of 0.65.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from cpu_kernels.top_k import top_k
from cpu_kernels.worker_pool import WorkerPool
from hybrid.generation import SamplingSettings
from profiler.common.openmp import torch_threads

_NUCLEUS = 1024  # tokens that nearly always hold top-p's share; finding them takes a tenth of the sort


class Choice(Protocol):
    """How one row's next token is chosen. Where neither property holds, it takes all logits, on the host."""

    @property
    def settings(self) -> SamplingSettings:
        """Temperature, top-k, top-p and min-p, which a draw from few takes."""

    @property
    def takes_largest(self) -> bool:
        """Whether the next token is that of the largest logit, whatever was seen: `most_likely`."""

    @property
    def draws_from_few(self) -> bool:
        """Whether a draw wants the largest logits only, whatever was seen: a top-k setting, or a nucleus."""

    def uniform(self) -> float:
        """The next number in [0, 1) to draw a token by."""

    def pick(self, logits: torch.Tensor, *, uniform: float | None = None) -> int:
        """The next token for `logits` [vocab] f32, which may be changed; uniform: what to draw by, by default the next
        number of its own. Raises `RuntimeError` for logits that are not numbers."""


class Sampler:
    """A `Choice` as `settings` say; the same seed and logits give the same tokens.

    Filters apply in the order of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
    """

    def __init__(self, settings: SamplingSettings, seen: Sequence[int] = ()) -> None:
        """seen: prompt and answer so far, for the repetition penalty; a list may grow."""
        self.settings, self._seen = settings, seen
        self._pool = WorkerPool(1)
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    @property
    def takes_largest(self) -> bool:
        return self.settings.greedy and self.settings.repetition_penalty == 1

    @property
    def draws_from_few(self) -> bool:
        s = self.settings
        few = 0 < s.top_k <= _NUCLEUS or (s.top_k == 0 and s.top_p < 1)
        return few and not s.greedy and s.repetition_penalty == 1

    def uniform(self) -> float:
        return float(torch.rand(1, generator=self._generator, dtype=torch.float64))

    @torch_threads(1)
    def pick(self, logits: torch.Tensor, *, uniform: float | None = None) -> int:
        settings = self.settings
        if settings.repetition_penalty != 1 and self._seen:
            logits = penalise(logits, self._seen, settings.repetition_penalty)
        if settings.greedy:
            return most_likely(logits)
        if not math.isfinite(logits.numpy().max()):
            raise not_numbers()
        ids, probabilities = candidates(logits, settings, self._pool)
        cumulative = probabilities.double().cumsum(0)
        point = (self.uniform() if uniform is None else uniform) * cumulative[-1:]
        return int(ids[min(int(torch.searchsorted(cumulative, point, right=True)), len(cumulative) - 1)])


def load_sampling_kernels() -> None:
    """Compile what drawing a token takes, or read it from its cache: 0.7 s that a first answer waited."""
    _largest(torch.zeros(1), 1, WorkerPool(1))


def most_likely(logits: torch.Tensor) -> int:
    """The id of the largest of logits f32 [vocab], the lowest among equals. Raises `RuntimeError` as `pick` does."""
    numbers = logits.numpy()
    largest = int(numbers.argmax())  # a NaN, where there is one
    if not math.isfinite(numbers[largest]):
        raise not_numbers()
    return largest


def not_numbers() -> RuntimeError:
    """What is raised for logits of which one is NaN, or the largest infinite."""
    return RuntimeError("the model's logits are not numbers; its weights may be damaged")


def candidates(logits: torch.Tensor, settings: SamplingSettings, pool: WorkerPool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [n] and probabilities f32 [n] of the tokens that temperature, top-k, top-p and min-p leave.

    The most likely token always stays. They come in falling order where top-k or top-p is set.
    """
    scaled = logits / settings.temperature
    if settings.top_k:
        ids = _largest(scaled, settings.top_k, pool)
        p = scaled[ids].softmax(0)
    else:
        p = scaled.softmax(0)
        ids = torch.arange(len(p)) if settings.top_p == 1 else _nucleus(scaled, p, settings.top_p, pool)
        p = p[ids]
    if settings.top_p < 1:
        kept = p.cumsum(0) - p < settings.top_p
        ids, p = ids[kept], p[kept]
    if settings.min_p > 0:
        kept = p >= settings.min_p * p.max()
        ids, p = ids[kept], p[kept]
    return ids, p / p.sum()


def _largest(logits: torch.Tensor, k: int, pool: WorkerPool) -> torch.Tensor:
    return torch.from_numpy(top_k(logits.numpy(), min(k, len(logits)), pool)).long()


def _nucleus(logits: torch.Tensor, p: torch.Tensor, share: float, pool: WorkerPool) -> torch.Tensor:
    """Ids in falling order, so many that their probabilities exceed `share`, or all."""
    ids = _largest(logits, _NUCLEUS, pool)
    return ids if p[ids].sum() > share else logits.sort(descending=True, stable=True).indices


def penalise(logits: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    """CTRL's penalty (arXiv 1909.05858): seen tokens' logits are divided when positive, multiplied when negative."""
    ids = torch.tensor(sorted(set(seen)))
    scores = logits[ids]
    return logits.index_put((ids,), torch.where(scores > 0, scores / penalty, scores * penalty))
