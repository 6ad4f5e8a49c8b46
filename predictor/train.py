"""Training the predictors of a whole model: ranks, start, Adam, rounding, thresholds, report.

Per layer the MLP starts as the best linear stand-in for the gate and is then trained with binary cross-entropy, where
a firing counts by its output mass. Its logits thus order neurons by the mass at stake, not by the chance of firing
alone: what costs perplexity is to miss a neuron that would have added much. Thresholds come last, on validation
documents and with the rounded weights, so that what is measured is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch.nn.functional import linear

from predictor.bank import PredictorBank
from predictor.linear_start import linear_start
from predictor.low_rank import LowRankPredictor
from predictor.partial import TrainingState
from predictor.quality import LogitHistogram, search_level
from predictor.report import CurvePoint, PredictorReport, Quality, overall_counts
from predictor.samples import BATCH, FFNWeights, batches, split_documents
from predictor.sizing import (
    SIZING_LEVEL,
    PredictorTarget,
    candidate_ranks,
    choose_ranks,
    rank_budget,
    shares_by_rank,
)
from profiler.common.errors import InputError
from profiler.common.progress import Progress, no_progress
from profiler.common.spec import ModelSpec

CURVE_LEVELS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.04, 0.08)

# Embedded model, 16384 tokens, 1% missed mass: 0, 1, 2, 4 passes predict 1.54, 1.52, 1.51, 1.51 times what fires.
_PASSES = 1
_MIN_STEPS = 32  # below this many batches, batches get smaller instead
_WARMUP = 20
# 1e-3 at d=384; Adam moves every weight by about this, and a hidden unit sums d of them.
_RATE_TIMES_ROOT_D = 0.02
_MAX_WEIGHT = 30.0
_ROUNDING_TOKENS = 4096
_MOST_LEVELS = 5  # whose perplexity is measured


@dataclass(frozen=True, eq=False)
class _Samples:
    """Inputs [n_layers, n, d] and the rows of them that train and that validate."""

    inputs: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    seed: int


def train_predictors(
    spec: ModelSpec,
    layers: Sequence[FFNWeights],
    inputs: np.ndarray,
    documents: np.ndarray,
    target: PredictorTarget,
    *,
    seed: int = 0,
    perplexity_of: Callable[[PredictorBank | None], float] | None = None,
    state: TrainingState | None = None,
    progress: Progress = no_progress,
) -> tuple[PredictorBank, PredictorReport]:
    """Train one predictor per layer and set their thresholds for `target`.

    inputs: f16 or f32 [n_layers, n, d], what each FFN read, after the norm before it; documents: int [n].
    perplexity_of: validation perplexity with a bank, or dense for None; called at most 6 times. Without it thresholds
    miss `SIZING_LEVEL` of the output mass. state: what an interrupted call has done, which is not done again; it is
    saved when this one is interrupted.
    Raises `CorpusError` when there are too few samples, `InputError` when shapes or bytes do not fit.
    """
    if inputs.shape != (spec.n_layers, len(documents), spec.d_model) or len(layers) != spec.n_layers:
        raise InputError(
            f"inputs are {list(inputs.shape)} with {len(documents)} documents' rows, this model wants "
            f"[{spec.n_layers}, n, {spec.d_model}]; run: hybrid profile"
        )
    if not spec.fires_sparsely:
        raise InputError(f"activation {spec.activation} fires densely; predictors need a kind of ReLU")
    samples = _Samples(inputs, *split_documents(documents, seed), seed)
    state = state or TrainingState()
    try:
        ranks = _ranks(spec, layers, samples, target, state, progress)
        histograms = _train_layers(layers, samples, ranks, state, progress)
        bank = PredictorBank(tuple(state.predictors))
        level, increase = _choose_level(bank, histograms, target, perplexity_of, progress)
    except KeyboardInterrupt:
        if not state.save():
            raise
        done = f"{len(state.predictors)} of {len(layers)} layers trained and {len(state.shares)} measured"
        raise KeyboardInterrupt(f"{done} are kept, run it again to go on") from None
    report = _report(bank, histograms, spec, target, level, increase)
    return bank.with_thresholds([histogram.threshold(level) for histogram in histograms]), report


def _ranks(
    spec: ModelSpec,
    layers: Sequence[FFNWeights],
    samples: _Samples,
    target: PredictorTarget,
    state: TrainingState,
    progress: Progress,
) -> list[int]:
    """The rank of each layer, from how fast its predicted share falls with rank."""
    candidates = candidate_ranks(spec, target)
    done = len(state.shares)
    with progress("ranks", len(layers), "layer", done) as advance:
        for layer, stored in enumerate(layers[done:], done):
            weights, inputs = stored.float(), samples.inputs[layer]
            start = linear_start(weights, inputs, samples.train, candidates[-1], samples.seed)
            state.shares.append(shares_by_rank(weights, start, inputs, samples.validation, candidates))
            state.layer_is_done()
            advance(1)
    return choose_ranks(state.shares, candidates, rank_budget(spec, target))


def _train_layers(
    layers: Sequence[FFNWeights],
    samples: _Samples,
    ranks: Sequence[int],
    state: TrainingState,
    progress: Progress,
) -> list[LogitHistogram]:
    """Train what `state` lacks; returns all layers' validation logits."""
    histograms = [
        _measure(layers[layer].float(), predictor, samples, layer) for layer, predictor in enumerate(state.predictors)
    ]
    done = len(state.predictors)
    with progress("train", len(layers), "layer", done) as advance:
        for layer in range(done, len(layers)):
            weights = layers[layer].float()
            predictor = _train_layer(weights, samples, layer, ranks[layer])
            histograms.append(_measure(weights, predictor, samples, layer))
            state.predictors.append(predictor)
            state.layer_is_done()
            advance(1)
    return histograms


def _train_layer(weights: FFNWeights, samples: _Samples, layer: int, rank: int) -> LowRankPredictor:
    """One layer's predictor, trained and rounded; threshold still 0."""
    inputs, rows = samples.inputs[layer], samples.train
    start = linear_start(weights, inputs, rows, rank, samples.seed)
    mlp = [part.requires_grad_() for part in start.mlp(rank)]
    scale = _mass_scale(weights, next(batches(inputs, rows, _ROUNDING_TOKENS)))
    rate = _RATE_TIMES_ROOT_D / inputs.shape[1] ** 0.5
    optimizer = torch.optim.Adam(mlp, lr=rate, betas=(0.9, 0.99))
    size = max(1, min(BATCH, len(rows) * _PASSES // _MIN_STEPS))
    steps = _PASSES * ceil(len(rows) / size)
    for step, x in enumerate(_shuffled(inputs, rows, size, samples.seed + layer)):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
        fired, mass = weights.fired_and_mass(x)
        logits = linear(linear(x, mlp[0], mlp[1]).relu(), mlp[2], mlp[3])
        optimizer.zero_grad()
        logits.backward(_cross_entropy_gradient(logits.detach(), fired, mass / scale))
        optimizer.step()
    fc1, b1, fc2, b2 = (part.detach() for part in mlp)
    return LowRankPredictor.quantized(fc1, b1, fc2, b2, next(batches(inputs, rows, _ROUNDING_TOKENS)))


def _mass_scale(weights: FFNWeights, x: torch.Tensor) -> float:
    """Mean output mass of a firing over x [t, d]; 1 where none fires."""
    fired, mass = weights.fired_and_mass(x)
    return float(mass.sum() / fired.sum().clamp_min(1)) or 1.0


def _cross_entropy_gradient(logits: torch.Tensor, fired: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """d(weighted BCE)/d(logits), mean over tokens; a firing counts `weight`, a silence 1. All are [t, f]."""
    error = torch.sigmoid(logits).sub_(fired.float())
    return error.mul_(torch.where(fired, weight.clamp_max(_MAX_WEIGHT), 1.0)).div_(len(logits))


def _shuffled(inputs: np.ndarray, rows: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Every row `_PASSES` times, in a seeded order, in batches of `size`."""
    rng = np.random.default_rng(seed)
    for _ in range(_PASSES):
        yield from batches(inputs, rng.permutation(rows), size)


def _measure(weights: FFNWeights, predictor: LowRankPredictor, samples: _Samples, layer: int) -> LogitHistogram:
    """Validation logits of a rounded predictor against what really fires."""
    histogram = LogitHistogram()
    for x in batches(samples.inputs[layer], samples.validation):
        histogram.add(predictor.logits(x), *weights.fired_and_mass(x))
    return histogram


def _choose_level(
    bank: PredictorBank,
    histograms: Sequence[LogitHistogram],
    target: PredictorTarget,
    perplexity_of: Callable[[PredictorBank | None], float] | None,
    progress: Progress,
) -> tuple[float, float | None]:
    """The missed output mass that every layer may have, and the perplexity increase measured at it."""
    if perplexity_of is None:
        return SIZING_LEVEL, None
    with progress("thresholds", 1 + _MOST_LEVELS, "trial") as advance:
        dense = perplexity_of(None)
        advance(1)

        def increase_of(level: float) -> float:
            found = perplexity_of(bank.with_thresholds([found.threshold(level) for found in histograms])) / dense - 1
            advance(1)
            return found

        return search_level(increase_of, target.max_perplexity_increase, _MOST_LEVELS)


def _report(
    bank: PredictorBank,
    histograms: Sequence[LogitHistogram],
    spec: ModelSpec,
    target: PredictorTarget,
    level: float,
    increase: float | None,
) -> PredictorReport:
    counts = [histogram.counts(level) for histogram in histograms]
    sizes, ranks = bank.bytes_per_layer, [predictor.rank for predictor in bank.predictors]
    overall = Quality.of("all", sum(ranks), sum(sizes), overall_counts(counts))
    return PredictorReport(
        layers=tuple(Quality.of(str(i), ranks[i], sizes[i], found) for i, found in enumerate(counts)),
        overall=overall,
        curve=tuple(_curve_point(histograms, at) for at in CURVE_LEVELS),
        tokens=counts[0].pairs // spec.d_ff,
        level=level,
        perplexity_increase=increase,
        shortfalls=_shortfalls(overall, target, increase),
    )


def _curve_point(histograms: Sequence[LogitHistogram], level: float) -> CurvePoint:
    quality = Quality.of("all", 0, 0, overall_counts([histogram.counts(level) for histogram in histograms]))
    thresholds = tuple(histogram.threshold(level) for histogram in histograms)
    return CurvePoint(
        level, thresholds, quality.recall, quality.precision, quality.predicted_share, quality.active_ratio
    )


def _shortfalls(overall: Quality, target: PredictorTarget, increase: float | None) -> tuple[str, ...]:
    """One line for each part of `target` that the predictors miss."""
    lines = []
    if increase is not None and increase > target.max_perplexity_increase:
        lines.append(f"perplexity rises by {increase:.2%}, the target is {target.max_perplexity_increase:.2%}")
    if overall.active_ratio > target.max_active_ratio:
        lines.append(
            f"{overall.active_ratio:.2f} times the firing neurons are predicted, the target is at most "
            f"{target.max_active_ratio:.2f}; allow a larger perplexity increase with --target"
        )
    return tuple(lines)
