"""How a row's token is chosen: what stays with the runner, what changes logits and in which order, what is noted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from serving_cases import request

from hybrid import SamplingSettings
from hybrid.errors import InputError
from hybrid.runtime.sampling import Sampler
from hybrid.serving.choice import RowChoice, token_logprob

GREEDY, DRAWN = SamplingSettings(temperature=0), SamplingSettings(temperature=1.0, top_k=4, seed=3)
LOGITS = torch.tensor([1.0, 4.0, 3.0, -1.0, 2.5])


class Only:
    """A constraint that allows some tokens, or fails."""

    def __init__(self, *tokens):
        self.tokens, self.accepted, self.is_finished = tokens, [], False

    def allowed(self):
        return np.isin(np.arange(5), self.tokens)

    def accept(self, token):
        self.accepted.append(token)


def choice(settings=GREEDY, seen=(0,), **more):
    return RowChoice(request(seen, settings=settings, **more), seen)


@pytest.mark.parametrize("more", [{"logit_bias": {1: -1}}, {"top_logprobs": 0}, {"presence_penalty": 1}])
def test_what_needs_no_logits_on_the_host(more):
    assert choice().takes_largest and not choice().draws_from_few
    assert choice(DRAWN).draws_from_few and not choice(DRAWN).takes_largest
    assert not choice(**more).takes_largest and not choice(DRAWN, **more).draws_from_few


def test_draws_are_a_samplers():
    ours, its = choice(DRAWN), Sampler(DRAWN)
    assert [ours.pick(LOGITS) for _ in range(20)] == [its.pick(LOGITS) for _ in range(20)]
    assert ours.uniform() == its.uniform()
    adjusted = choice(DRAWN, logit_bias={1: -100.0})
    assert {0, 2, 4} <= {adjusted.pick(LOGITS) for _ in range(60)} <= {0, 2, 3, 4}


def test_penalties_are_of_the_answer_and_by_its_counts():
    seen = [1, 1, 1]
    ours = choice(seen=seen, frequency_penalty=0.6)
    assert ours.pick(LOGITS) == 1  # the prompt does not count
    seen.append(1)
    assert ours.pick(LOGITS) == 1  # 4 - 0.6 = 3.4
    seen.append(1)
    assert ours.pick(LOGITS) == 2  # 2.8
    seen.append(2)
    assert ours.pick(LOGITS) == 1  # 2.8 against 3 - 0.6 = 2.4 and 2.5
    once = choice(seen=(both := [0]), presence_penalty=1.2)
    both += [1, 1, 1]
    assert once.pick(LOGITS) == 2  # 4 - 1.2, whatever their number


def test_the_repetition_penalty_comes_first():
    """4 / 2 + 1.5 = 3.5 beats 3; (4 + 1.5) / 2 would not."""
    settings = replace(GREEDY, repetition_penalty=2.0)
    assert choice(settings, seen=(1,), logit_bias={1: 1.5}).pick(LOGITS) == 1
    assert choice(settings, seen=(1,)).pick(LOGITS) == 2


def test_logits_are_left_as_they_are():
    before = LOGITS.clone()
    choice(DRAWN, seen=[1], logit_bias={2: 5}, constraint=Only(0), presence_penalty=1, top_logprobs=3).pick(LOGITS)
    assert torch.equal(LOGITS, before)


def test_a_constraint_hears_what_it_allowed():
    only = Only(0, 4)
    assert choice(constraint=only).pick(LOGITS) == 4 and only.accepted == [4]


def test_a_constraint_that_allows_nothing_ends_its_own_answer_only():
    ours = choice(constraint=Only())
    ours.pick(LOGITS)
    assert isinstance(ours.failure, InputError) and "no token can follow" in str(ours.failure)


def test_a_logprob_is_of_the_models_own_logits():
    ours = choice(logit_bias={3: 100}, top_logprobs=2)
    assert ours.pick(LOGITS) == 3
    total = math.log(sum(math.exp(value) for value in LOGITS.tolist()))
    assert ours.logprob.token == 3 and ours.logprob.logprob == pytest.approx(-1 - total, abs=1e-6)
    assert [token for token, _ in ours.logprob.top] == [1, 2]
    assert [value for _, value in ours.logprob.top] == pytest.approx([4 - total, 3 - total], abs=1e-6)
    assert token_logprob(LOGITS, 0, 0).top == () and len(token_logprob(LOGITS, 0, 20).top) == 5


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(RuntimeError, match="not numbers"):
        choice(logit_bias={1: 1}).pick(torch.full((5,), torch.nan))
