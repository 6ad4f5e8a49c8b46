"""Sampling: filters against transformers' own and a plain sort, penalties, seeds, frequencies."""

import math

import pytest
import torch

from cpu_kernels.worker_pool import WorkerPool
from hybrid.generation import SamplingSettings
from hybrid.runtime.sampling import Sampler, candidates, most_likely

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"top_k": 50, "min_p": 0.05},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.6, "top_p": 0.9, "min_p": 0.01},
]


def probabilities(logits, settings):
    """Of every token, from those that are left."""
    ids, p = candidates(logits, settings, WorkerPool(1))
    assert len(set(ids.tolist())) == len(ids) and (p > 0).all()
    return torch.zeros_like(logits).scatter_(0, ids, p)


def probabilities_ref(logits, settings):
    """The filters over the sorted vocabulary."""
    scaled, order = (logits / settings.temperature).sort(descending=True, stable=True)
    if settings.top_k:
        scaled[settings.top_k :] = -torch.inf
    if settings.top_p < 1:
        p = scaled.softmax(0)
        scaled[p.cumsum(0) - p >= settings.top_p] = -torch.inf
    if settings.min_p > 0:
        p = scaled.softmax(0)
        scaled[p < settings.min_p * p[0]] = -torch.inf
    return torch.zeros_like(scaled).scatter_(0, order, scaled.softmax(0))


@pytest.mark.parametrize("change", CASES)
def test_filters_match_transformers(change):
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    settings = SamplingSettings(**(OFF | change))
    logits = torch.randn(97, generator=torch.Generator().manual_seed(3)) * 3
    truth = logits[None] / settings.temperature
    if settings.top_k:
        truth = logits_process.TopKLogitsWarper(settings.top_k)(None, truth)
    if settings.top_p < 1:
        truth = logits_process.TopPLogitsWarper(settings.top_p)(None, truth)
    if settings.min_p:
        truth = logits_process.MinPLogitsWarper(settings.min_p)(None, truth)
    torch.testing.assert_close(probabilities(logits, settings), truth[0].softmax(0))


@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("vocab", [1, 17, 4095, 32000])
def test_filters_match_the_sorted_vocabulary(vocab, spread, change):
    """Flat logits too, of which the tokens that top-p looks at first hold too little."""
    settings = SamplingSettings(**(OFF | change))
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    kept = logits.clone()
    ours, truth = probabilities(logits, settings), probabilities_ref(logits, settings)
    # A sum of thousands of probabilities in another order may put one token more or less inside top-p.
    assert (ours - truth).abs().sum() < 1e-5 + 4 * (settings.top_p < 1) * truth[truth > 0].min()
    assert (logits == kept).all()


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids():
    ids, p = candidates(torch.tensor([1.0, 2.0, 1.0, 1.0]), SamplingSettings(**(OFF | {"top_k": 3})), WorkerPool(1))
    assert ids.tolist() == [1, 0, 2] and p[1] == p[2]


@pytest.mark.parametrize("change", [{}, {"top_k": 5}, {"temperature": 0}])
def test_logits_that_are_not_numbers_are_refused(change):
    logits = torch.zeros(9)
    logits[4] = math.nan
    with pytest.raises(RuntimeError, match="logits are not numbers"):
        Sampler(SamplingSettings(**(OFF | change))).pick(logits)


def test_repetition_penalty_matches_transformers():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.tensor([2.0, 1.9, -0.1, -0.2])
    seen = [0, 2, 2]
    for penalty in (0.8, 1.3, 5.0):
        processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
        truth = processor(torch.tensor([seen]), logits[None].clone())[0].argmax()
        sampler = Sampler(SamplingSettings(temperature=0, repetition_penalty=penalty), seen)
        assert sampler.pick(logits) == truth


def test_greedy_takes_the_largest_whatever_the_seed():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert Sampler(SamplingSettings(temperature=0, seed=1)).pick(logits) == logits.argmax()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_most_likely_refuses_logits_that_are_not_numbers(bad):
    logits = torch.zeros(9)
    logits[4] = bad
    with pytest.raises(RuntimeError, match="logits are not numbers"):
        most_likely(logits)
    with pytest.raises(RuntimeError, match="logits are not numbers"):
        most_likely(torch.full((9,), -math.inf))


def test_most_likely_is_the_lowest_of_equals():
    logits = torch.zeros(300)
    logits[[290, 7, 80]] = 2.0
    logits[5] = -math.inf
    assert most_likely(logits) == 7 == Sampler(SamplingSettings(temperature=0)).pick(logits)


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"temperature": 0}, True), ({"temperature": 0.1}, False), ({"temperature": 0, "repetition_penalty": 1.1}, False)],
)
def test_what_takes_the_largest_whatever_was_seen(change, expected):
    assert Sampler(SamplingSettings(**(OFF | change))).takes_largest == expected


def draw(seed, count=200):
    sampler = Sampler(SamplingSettings(seed=seed, **OFF))
    logits = torch.tensor([0.0, 1.0, 2.0])
    return [sampler.pick(logits) for _ in range(count)]


def test_seeds():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_frequencies_follow_the_probabilities():
    counts = torch.bincount(torch.tensor(draw(0, 4000)), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.03, rtol=0)


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.full((300,), -torch.inf)
    logits[[7, 298]] = 0.0
    sampler = Sampler(SamplingSettings(seed=1, **OFF))
    assert {sampler.pick(logits) for _ in range(200)} == {7, 298}
