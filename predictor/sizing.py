"""Which rank each layer gets for the quality that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from predictor.linear_start import LinearStart
from predictor.low_rank import predictor_bytes
from predictor.quality import LogitHistogram
from predictor.samples import FFNWeights, batches
from predictor.target import PredictorTarget
from profiler.common.errors import InputError
from profiler.common.spec import ModelSpec

SIZING_LEVEL = 0.01  # missed output mass at which ranks are compared
SIZING_TOKENS = 2048
_RANK_STEPS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)  # of the rank that equal shares of the bytes would give


def candidate_ranks(spec: ModelSpec, target: PredictorTarget) -> list[int]:
    """Ascending ranks to choose from, around an equal share of the bytes. Raises `InputError` if not one fits."""
    per_layer = target.max_bytes_share * spec.model_bytes / spec.n_layers
    fixed = predictor_bytes(spec.d_model, spec.d_ff, 0)
    equal = int((per_layer - fixed) / (predictor_bytes(spec.d_model, spec.d_ff, 1) - fixed))
    if equal < 1:
        raise InputError(
            f"{target.max_bytes_share:.2%} of the model is {int(per_layer)} bytes per layer, too few for a predictor "
            f"of rank 1; allow a larger share"
        )
    limit = min(spec.d_model, spec.d_ff)
    return sorted({min(limit, max(1, int(step * equal))) for step in _RANK_STEPS})


def shares_by_rank(
    weights: FFNWeights, start: LinearStart, inputs: np.ndarray, rows: np.ndarray, ranks: Sequence[int]
) -> list[float]:
    """The share of neurons that must be predicted at each of the ascending `ranks` to miss `SIZING_LEVEL` of the mass.

    Ranks nest, so each adds only its own columns to the approximate gate.
    """
    histograms = [LogitHistogram() for _ in ranks]
    for x in batches(inputs, rows[:SIZING_TOKENS]):
        fired, mass = weights.fired_and_mass(x)
        hidden = (x - start.mean) @ start.fc1.T
        gate, done = start.center.expand(len(x), -1).clone(), 0
        for rank, histogram in zip(ranks, histograms, strict=True):
            gate += hidden[:, done:rank] @ start.fc2[:, done:rank].T
            done = rank
            histogram.add(gate * start.logit_scale(rank), fired, mass)
    return [histogram.counts(SIZING_LEVEL).predicted_share for histogram in histograms]


def choose_ranks(shares: Sequence[Sequence[float]], ranks: Sequence[int], budget: int) -> list[int]:
    """One of `ranks` per layer, so that `budget`, the sum of ranks, leaves the fewest neurons predicted.

    shares: per layer, the predicted share at each rank. Greedy: the step that saves most per rank goes first.
    """
    chosen = [0] * len(shares)
    spent = ranks[0] * len(shares)
    while True:
        steps = [
            ((shares[layer][at] - shares[layer][to]) / (ranks[to] - ranks[at]), layer, to)
            for layer, at in enumerate(chosen)
            for to in range(at + 1, len(ranks))
            if spent + ranks[to] - ranks[at] <= budget
        ]
        gain, layer, to = max(steps, key=lambda step: step[0], default=(0.0, 0, 0))
        if gain <= 0:
            return [ranks[at] for at in chosen]
        spent += ranks[to] - ranks[chosen[layer]]
        chosen[layer] = to


def rank_budget(spec: ModelSpec, target: PredictorTarget) -> int:
    """The largest sum of ranks over all layers whose bytes stay within the target."""
    fixed = predictor_bytes(spec.d_model, spec.d_ff, 0)
    per_rank = predictor_bytes(spec.d_model, spec.d_ff, 1) - fixed
    return int((target.max_bytes_share * spec.model_bytes - spec.n_layers * fixed) // per_rank)
