"""Sampling: filters against transformers' own, penalties, seeds."""

import pytest
import torch

from hybrid.generation import SamplingSettings
from hybrid.sampling import Sampler, filtered_probabilities

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


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
    torch.testing.assert_close(filtered_probabilities(logits, settings), truth[0].softmax(0))


def test_repetition_penalty_matches_transformers():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.tensor([2.0, 1.9, -0.1, -0.2])
    seen = [0, 2, 2]
    for penalty in (0.8, 1.3, 5.0):
        processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
        truth = processor(torch.tensor([seen]), logits[None].clone())[0].argmax()
        sampler = Sampler(SamplingSettings(temperature=0, repetition_penalty=penalty))
        assert sampler.pick(logits, seen) == truth


def test_greedy_takes_the_largest_whatever_the_seed():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert Sampler(SamplingSettings(temperature=0, seed=1)).pick(logits, []) == logits.argmax()


def draw(seed, count=200):
    sampler = Sampler(SamplingSettings(seed=seed, **OFF))
    logits = torch.tensor([0.0, 1.0, 2.0])
    return [sampler.pick(logits, []) for _ in range(count)]


def test_seeds():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_frequencies_follow_the_probabilities():
    counts = torch.bincount(torch.tensor(draw(0, 4000)), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.03, rtol=0)
