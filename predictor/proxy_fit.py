"""Thresholds of proxies: as many neurons left out as the perplexity that is asked for allows.

Every layer leaves out the same share of its neurons, those of the lowest scores. On SmolLM2-135M, where 40 and 60% are
left out by exact scores (KL 0.0138 and 0.087), one common threshold on scores as shares of the residual's length cost
the same (0.0140, 0.086), and so did one by the loss that each layer alone was measured to cause (0.0134, 0.087); equal
missed mass cost more (0.097), and shares of the FFN's own output much more (0.149). The share is searched for on
validation text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from predictor.proxy import LayerProxy, ProxyBank
from predictor.quality import Counts, Levels, search_level
from predictor.report import CurvePoint, PredictorReport, Quality, overall_counts
from predictor.row_copies import RowCopies
from predictor.samples import FFNWeights, batches
from predictor.target import PredictorTarget
from profiler.common.errors import CorpusError, InputError
from profiler.common.progress import Progress, no_progress
from profiler.common.spec import ModelSpec

CURVE_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of neurons left out
MOST_TOKENS = 4096  # whose scores are looked at
MIN_TOKENS = 64
# Powers of 2 that scores are counted by: bins of 0.7%.
_LOW, _HIGH, _BINS = -24.0, 16.0, 4096
_STEP = (_HIGH - _LOW) / _BINS
# Shares left out, and how perplexity grows with them: +1.6 and +6.9% at 40 and 60% on SmolLM2-135M.
SHARES, _MOST_SHARES = Levels(0.35, (0.01, 0.98), 4.0, (1.0, 12.0)), 6


class ScoreHistogram:
    """Pairs and output mass by score. Bin 0 also holds what is below its range, the last what is above."""

    def __init__(self) -> None:
        self._pairs = torch.zeros(_BINS, dtype=torch.int64)
        self._mass = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, scores: torch.Tensor, mass: torch.Tensor) -> None:
        """Count some tokens: scores and output mass f32 [t, f]."""
        bins = ((scores.log2() - _LOW) / _STEP).floor_().clamp_(0, _BINS - 1).long().flatten()
        self._pairs += torch.bincount(bins, minlength=_BINS)
        self._mass += torch.bincount(bins, weights=mass.flatten().double(), minlength=_BINS)

    def edge(self, share: float) -> int:
        """The highest bin edge below which at most `share` of the pairs are."""
        below = self._pairs.cumsum(0)
        return int(torch.searchsorted(below, torch.tensor(int(share * int(below[-1]))), right=True))

    def threshold(self, share: float) -> float:
        """The score of `edge(share)`, 0 where all pass."""
        edge = self.edge(share)
        return float(2.0 ** (_LOW + edge * _STEP)) if edge else 0.0

    def counts(self, share: float) -> Counts:
        """At `threshold(share)`. Every neuron counts as firing."""
        edge, pairs, mass = self.edge(share), int(self._pairs.sum()), float(self._mass.sum())
        passing = int(self._pairs[edge:].sum())
        return Counts(pairs, passing, pairs, passing, mass, float(self._mass[:edge].sum()))


@dataclass(frozen=True, eq=False)
class ProxyFit:
    """Scores of sampled tokens, from which thresholds follow. rows: of the samples."""

    spec: ModelSpec
    bank: ProxyBank
    layers: Sequence[FFNWeights]
    inputs: np.ndarray
    rows: np.ndarray
    histograms: tuple[ScoreHistogram, ...]

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        copies: RowCopies,
        layers: Sequence[FFNWeights],
        inputs: np.ndarray,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> ProxyFit:
        """inputs: f16 or f32 [n_layers, n, d], what each FFN read, after the norm before it.

        Raises `CorpusError` when there are too few samples, `InputError` when shapes do not fit.
        """
        if inputs.ndim != 3 or inputs.shape[::2] != (spec.n_layers, spec.d_model):
            wanted = f"this model wants [{spec.n_layers}, n, {spec.d_model}]; run: hybrid profile"
            raise InputError(f"inputs are {list(inputs.shape)}, {wanted}")
        if inputs.shape[1] < MIN_TOKENS:
            few = f"the profile samples {inputs.shape[1]} tokens, thresholds want at least {MIN_TOKENS}"
            raise CorpusError(f"{few}; run hybrid profile with more text")
        rows = np.sort(np.random.default_rng(seed).permutation(inputs.shape[1])[:MOST_TOKENS])
        shape, lengths, histograms = (spec.n_layers, spec.d_ff), [], []
        with progress("scores", len(layers), "layer") as advance:
            for number, stored in enumerate(layers):
                weights, found = stored.float(), ScoreHistogram()
                lengths.append(weights.down_norm.numpy())
                proxy = LayerProxy(copies.layers[number], lengths[-1], 0.0)
                for x in batches(inputs[number], rows):
                    found.add(proxy.scores(weights, x), weights.fired_and_mass(x)[1])
                histograms.append(found)
                advance(1)
        none = np.zeros(spec.n_layers, np.float32), np.zeros(shape, np.int64)
        bank = ProxyBank(copies, np.stack(lengths), *none, tokens=len(rows))
        return cls(spec, bank, layers, inputs, rows, tuple(histograms))

    def leaving_out(self, share: float) -> ProxyBank:
        """Proxies with the thresholds at which every layer leaves out `share`; nothing is counted yet."""
        return self.bank.with_thresholds([found.threshold(share) for found in self.histograms])

    def search(
        self,
        target: PredictorTarget,
        perplexity_of: Callable[[ProxyBank | None], float],
        progress: Progress = no_progress,
    ) -> tuple[float, float]:
        """The share to leave out for `target`, and the perplexity increase measured there.

        perplexity_of: validation perplexity with a bank, or dense for None; called at most 7 times.
        """
        with progress("thresholds", 1 + _MOST_SHARES, "trial") as advance:
            dense = perplexity_of(None)
            advance(1)

            def increase_of(share: float) -> float:
                found = perplexity_of(self.leaving_out(share)) / dense - 1
                advance(1)
                return found

            return search_level(increase_of, target.max_perplexity_increase, _MOST_SHARES, SHARES)

    def finished(
        self,
        share: float,
        increase: float | None = None,
        target: PredictorTarget | None = None,
        progress: Progress = no_progress,
    ) -> ProxyBank:
        """The proxies that leave out `share`, with counts and a report. increase: of perplexity, where measured."""
        found = self.leaving_out(share)
        return replace(found, counts=self._count(found, progress), report=self._report(share, increase, target))

    def _count(self, bank: ProxyBank, progress: Progress) -> np.ndarray:
        """For how many of the sampled tokens each neuron passes: int64 [n_layers, d_ff]."""
        counts = np.zeros(bank.counts.shape, np.int64)
        with progress("counts", len(self.layers), "layer") as advance:
            for number, stored in enumerate(self.layers):
                weights, proxy = stored.float(), bank.layer(number)
                for x in batches(self.inputs[number], self.rows):
                    counts[number] += (proxy.scores(weights, x) >= proxy.threshold).sum(0).numpy()
                advance(1)
        return counts

    def _report(self, share: float, increase: float | None, target: PredictorTarget | None) -> PredictorReport:
        counts, sizes = [found.counts(share) for found in self.histograms], self.bank.bytes_per_layer
        shortfalls: tuple[str, ...] = ()
        if target is not None and increase is not None and increase > target.max_perplexity_increase:
            wanted = f"the target is {target.max_perplexity_increase:.2%}"
            shortfalls = (f"perplexity rises by {increase:.2%}, {wanted}",)
        return PredictorReport(
            layers=tuple(Quality.of(str(n), 0, sizes[n], found) for n, found in enumerate(counts)),
            overall=Quality.of("all", 0, sum(sizes), overall_counts(counts)),
            curve=tuple(self._curve_point(at) for at in CURVE_SHARES),
            tokens=len(self.rows),
            level=share,
            perplexity_increase=increase,
            shortfalls=shortfalls,
        )

    def _curve_point(self, share: float) -> CurvePoint:
        q = Quality.of("all", 0, 0, overall_counts([found.counts(share) for found in self.histograms]))
        thresholds = tuple(found.threshold(share) for found in self.histograms)
        return CurvePoint(share, thresholds, q.recall, q.precision, q.predicted_share, q.active_ratio)
