"""Quality of a predictor at any threshold, from one pass over validation tokens, and the search for the threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_LOW, _HIGH, _BINS = -16.0, 16.0, 4096
_BIN = (_HIGH - _LOW) / _BINS
_PREDICT_ALL = float(np.finfo(np.float32).min)  # finite, so that it survives JSON


@dataclass(frozen=True)
class Counts:
    """Sums over (token, neuron) pairs: all, predicted, fired, both; and output mass, all of it and missed.

    Recall is 1 where nothing fired, precision is 1 where nothing was predicted.
    """

    pairs: int
    predicted: int
    fired: int
    hits: int
    mass: float
    missed: float

    @property
    def recall(self) -> float:
        return self.hits / self.fired if self.fired else 1.0

    @property
    def precision(self) -> float:
        return self.hits / self.predicted if self.predicted else 1.0

    @property
    def predicted_share(self) -> float:
        return self.predicted / self.pairs

    @property
    def fired_share(self) -> float:
        return self.fired / self.pairs

    @property
    def missed_mass(self) -> float:
        """The share of the output mass that belongs to neurons which fired unpredicted."""
        return self.missed / self.mass if self.mass else 0.0


class LogitHistogram:
    """Pairs, firings and output mass by logit. Bin 0 also holds what is below its range, the last what is above."""

    def __init__(self) -> None:
        self._pairs = torch.zeros(_BINS, dtype=torch.int64)
        self._fired = torch.zeros(_BINS, dtype=torch.int64)
        self._mass = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, logits: torch.Tensor, fired: torch.Tensor, mass: torch.Tensor) -> None:
        """Count some tokens: logits, fired and mass are [t, f]."""
        bins = ((logits - _LOW) / _BIN).floor_().clamp_(0, _BINS - 1).long()
        self._pairs += torch.bincount(bins.flatten(), minlength=_BINS)
        fired_bins = bins[fired]
        self._fired += torch.bincount(fired_bins, minlength=_BINS)
        self._mass += torch.bincount(fired_bins, weights=mass[fired].double(), minlength=_BINS)

    def edge(self, level: float) -> int:
        """The highest bin edge that misses at most `level` of the output mass; logit 0 where nothing fired."""
        total = float(self._mass.sum())
        if total == 0:
            return _BINS // 2
        missed = self._mass.cumsum(0)
        return int(torch.searchsorted(missed, torch.tensor(level * total, dtype=torch.float64), right=True))

    def threshold(self, level: float) -> float:
        """The logit of `edge(level)`."""
        edge = self.edge(level)
        return _LOW + edge * _BIN if edge else _PREDICT_ALL

    def counts(self, level: float) -> Counts:
        """Quality at `threshold(level)`."""
        edge = self.edge(level)
        return Counts(
            pairs=int(self._pairs.sum()),
            predicted=int(self._pairs[edge:].sum()),
            fired=int(self._fired.sum()),
            hits=int(self._fired[edge:].sum()),
            mass=float(self._mass.sum()),
            missed=float(self._mass[:edge].sum()),
        )


@dataclass(frozen=True)
class Levels:
    """Levels to be searched: the first tried, the least and the largest, and the power of the level with which
    perplexity grows, as expected and at the least and the most."""

    first: float
    limits: tuple[float, float]
    growth: float
    growth_limits: tuple[float, float]


# Perplexity grows a little faster than the missed mass (0.29, 0.41, 0.92% at 0.5, 1, 2% on the embedded model).
MISSED_MASS = Levels(0.01, (1e-4, 0.3), 1.2, (0.5, 2.5))
_NEAR_ENOUGH, _AIM = 0.85, 0.93


def search_level(
    increase_of: Callable[[float], float], target: float, calls: int = 5, levels: Levels = MISSED_MASS
) -> tuple[float, float]:
    """The largest level tried, of missed mass unless `levels` are others, whose perplexity increase is at most
    `target`, with that increase.

    Where none was, the smallest tried. `increase_of` is called at most `calls` times.
    """
    tried: dict[float, float] = {}
    level, limits = levels.first, levels.limits
    for _ in range(calls):
        tried[level] = increase = increase_of(level)
        at_the_end = level == limits[1] if increase <= target else level == limits[0]
        if at_the_end or _NEAR_ENOUGH * target <= increase <= target:
            break
        level = _next_level(tried, level, target, levels)
    within = [level for level, increase in tried.items() if increase <= target]
    best = max(within) if within else min(tried)
    return best, tried[best]


def _next_level(tried: dict[float, float], level: float, target: float, levels: Levels) -> float:
    """A secant step in logarithms from `level`, kept between the levels known to be good and bad."""
    increases = {at: max(increase, target / 20) for at, increase in tried.items()}  # measured ones may be below 0
    growth = levels.growth
    if len(tried) > 1:
        (level0, increase0), (level1, increase1) = list(increases.items())[-2:]
        growth = float(np.clip(np.log(increase1 / increase0) / np.log(level1 / level0), *levels.growth_limits))
    step = (_AIM * target / increases[level]) ** (1 / growth)
    level = float(np.clip(level * np.clip(step, 0.1, 10), *levels.limits))
    low = max((at for at, increase in tried.items() if increase <= target), default=0.0)
    high = min((at for at, increase in tried.items() if increase > target), default=1.0)
    return level if low < level < high else (low * high) ** 0.5
