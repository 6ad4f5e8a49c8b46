"""Thresholds, the counts behind the report, the search for a level, and the choice of ranks."""

import itertools
import json

import numpy as np
import pytest
import torch
from predictor_cases import small_spec

from predictor.low_rank import predictor_bytes
from predictor.quality import Counts, LogitHistogram, search_level
from predictor.report import CurvePoint, PredictorReport, Quality, overall_counts
from predictor.sizing import candidate_ranks, choose_ranks, rank_budget
from predictor.target import PredictorTarget
from profiler.common.errors import ArtifactError, InputError


def _pairs(seed, tokens=700, neurons=37, spread=3.0):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((tokens, neurons)) - 1.2
    fired = truth > 0
    logits = spread * (truth + 0.4 * rng.standard_normal(truth.shape))
    mass = np.where(fired, truth * rng.exponential(size=truth.shape), 0)
    return logits.astype(np.float32), fired, mass.astype(np.float32)


def _histogram(logits, fired, mass):
    histogram = LogitHistogram()
    for part in zip(*(np.array_split(array, 3) for array in (logits, fired, mass)), strict=True):
        histogram.add(*(torch.from_numpy(array) for array in part))
    return histogram


@pytest.mark.parametrize("level", [0.0, 0.001, 0.02, 0.3])
@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
def test_counts_are_those_of_the_threshold(level, spread):
    logits, fired, mass = _pairs(0, spread=spread)
    histogram = _histogram(logits, fired, mass)
    predicted, counts = logits >= histogram.threshold(level), histogram.counts(level)
    assert counts.pairs == logits.size
    assert (counts.predicted, counts.fired) == (predicted.sum(), fired.sum())
    assert counts.recall == pytest.approx((predicted & fired).sum() / fired.sum())
    assert counts.precision == pytest.approx((predicted & fired).sum() / predicted.sum())
    assert counts.predicted_share == pytest.approx(predicted.mean())
    assert counts.missed_mass == pytest.approx((mass * (fired & ~predicted)).sum() / mass.sum(), abs=1e-6)


@pytest.mark.parametrize("level", [0.001, 0.01, 0.1])
def test_threshold_misses_the_mass_asked_for_and_hardly_less(level):
    missed = _histogram(*_pairs(1, tokens=3000)).counts(level).missed_mass
    assert 0.8 * level <= missed <= level


def test_threshold_where_nothing_fired_is_even_odds():
    histogram = LogitHistogram()
    histogram.add(torch.randn(50, 7), torch.zeros(50, 7, dtype=torch.bool), torch.zeros(50, 7))
    assert histogram.threshold(0.01) == 0.0
    assert histogram.counts(0.01).recall == 1.0 and histogram.counts(0.01).missed_mass == 0.0


def test_overall_weighs_layers_by_pairs_but_their_mass_equally():
    layers = [Counts(100, 20, 10, 8, 1000.0, 100.0), Counts(300, 90, 40, 36, 1.0, 0.3)]
    overall = Quality.of("all", 3, 4, overall_counts(layers))
    assert overall.recall == pytest.approx(44 / 50) and overall.precision == pytest.approx(44 / 110)
    assert overall.predicted_share == pytest.approx(110 / 400) and overall.fired_share == pytest.approx(50 / 400)
    assert overall.active_ratio == pytest.approx(110 / 50)
    assert overall.missed_mass == pytest.approx((0.1 + 0.3) / 2)


def test_report_survives_json_and_lists_the_total_last():
    line = Quality("0", 3, 99, 0.9, 0.5, 0.2, 0.1, 0.01)
    report = PredictorReport(
        (line,),
        Quality("all", 3, 99, 0.9, 0.5, 0.2, 0.1, 0.01),
        (CurvePoint(0.01, (0.5, -3.0), 0.9, 0.5, 0.2, 2.0),),
        700,
        0.01,
        0.004,
        ("too many",),
    )
    assert PredictorReport.from_json(report.to_json()) == report
    assert [row["layer"] for row in report.rows()] == ["0", "all"]
    assert report.rows()[0]["active_ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"curve": [], "layers": [{"rank": 1}]})])
def test_unreadable_report_is_refused(text):
    with pytest.raises(ArtifactError, match="report is unreadable"):
        PredictorReport.from_json(text)


@pytest.mark.parametrize("exponent", [0.7, 1.2, 2.0])
@pytest.mark.parametrize("factor", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("target", [0.002, 0.005, 0.02])
def test_search_finds_the_level_that_meets_the_target(exponent, factor, target):
    calls = []

    def increase_of(level):
        calls.append(level)
        return factor * level**exponent

    level, increase = search_level(increase_of, target)
    assert level in calls and increase == factor * level**exponent and len(calls) <= 5
    reachable = factor * 1e-4**exponent <= target
    assert increase <= target if reachable else level == 1e-4
    assert increase >= 0.5 * target or level == 0.3


def test_search_that_cannot_meet_the_target_returns_the_smallest_level_tried():
    calls = []
    level, increase = search_level(lambda level: calls.append(level) or 0.5, 0.005)
    assert level == min(calls) and increase == 0.5


def test_ranks_are_close_to_the_best_choice_and_within_the_budget():
    rng = np.random.default_rng(0)
    ranks = [2, 3, 5, 8]
    for _ in range(30):
        shares = [(rng.uniform(0.1, 1) * np.exp(-rng.uniform(0.1, 1) * np.array(ranks))).tolist() for _ in range(4)]
        chosen = choose_ranks(shares, ranks, 20)
        assert sum(chosen) <= 20
        costs = {
            pick: sum(shares[layer][ranks.index(rank)] for layer, rank in enumerate(pick))
            for pick in itertools.product(ranks, repeat=4)
            if sum(pick) <= 20
        }
        assert costs[tuple(chosen)] <= 1.25 * min(costs.values()) + 1e-9


def test_a_layer_that_gains_nothing_keeps_the_lowest_rank():
    assert choose_ranks([[0.5, 0.5, 0.5], [0.5, 0.3, 0.2]], [2, 4, 6], 100) == [2, 6]


@pytest.mark.parametrize("share", [0.2, 0.4, 1.0])
def test_budget_in_ranks_is_the_largest_within_the_bytes(share):
    spec, target = small_spec(vocab_size=2000, dtype="bf16"), PredictorTarget(max_bytes_share=share)
    budget = rank_budget(spec, target)
    used = [
        sum(predictor_bytes(24, 37, rank) for rank in (total // 2, total - total // 2))
        for total in (budget, budget + 1)
    ]
    assert used[0] <= share * spec.model_bytes < used[1]
    ranks = candidate_ranks(spec, target)
    assert ranks == sorted(set(ranks)) and ranks[0] >= 1 and ranks[-1] <= 24 and 2 * ranks[0] <= budget


def test_bytes_too_few_for_any_rank_are_refused():
    with pytest.raises(InputError, match="rank 1"):
        candidate_ranks(small_spec(), PredictorTarget(max_bytes_share=0.001))


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), ("1%", 0.01), ("100%", 1.0)])
def test_target_in_per_cent(text, share):
    assert PredictorTarget.parse(text).max_perplexity_increase == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "0.5", "nan%", "0%", "-1%", "101%", "inf%", "half%"])
def test_bad_target_is_refused(text):
    with pytest.raises(InputError, match=r"such as 0\.5%"):
        PredictorTarget.parse(text)


@pytest.mark.parametrize("changes", [{"max_active_ratio": 0.5}, {"max_bytes_share": 0}, {"max_bytes_share": 1.5}])
def test_target_is_checked_when_built(changes):
    with pytest.raises(InputError):
        PredictorTarget(**changes)
