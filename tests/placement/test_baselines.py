"""Placements that the solver's is held against: within the budget to the last neuron, and with what they promise."""

import numpy as np
import pytest
from placement_cases import small_spec

from placement.baselines import random_split, whole_layers
from placement.placement import Placement
from placement.plan import VramPlan
from profiler.common.errors import BudgetError

SPEC = small_spec(n_layers=5, d_model=128, d_ff=300, vocab_size=900)
PLAN = VramPlan(SPEC, 40, (0, 700, 700, 0, 5000), prefill_chunk=8)


def budget_of(layers, hot, head):
    """Bytes of a choice with so many layers and `hot` neurons in each."""
    placed = Placement.all_hot(SPEC)
    placed.hot[:layers], placed.hot[layers:], placed.layer_on_gpu[layers:] = hot, 0, False
    choice = placed.choice
    return PLAN.total_bytes(type(choice)(choice.hot, choice.layer_on_gpu, head))


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("head", [False, True])
def test_whole_layers_as_they_fit(layers, head):
    budget = budget_of(layers, SPEC.d_ff, head)
    found = whole_layers(PLAN, budget)
    assert found.layer_on_gpu.tolist() == [number < layers for number in range(5)]
    assert (found.hot == np.where(found.layer_on_gpu, SPEC.d_ff, 0)).all() and found.head_on_gpu == head
    assert PLAN.total_bytes(found.choice) == budget
    if layers > 1 or head:
        fewer = whole_layers(PLAN, budget - 1)
        assert PLAN.total_bytes(fewer.choice) < budget


@pytest.mark.parametrize("budget", [budget_of(5, 7, True), budget_of(5, 150, True) + 3000, budget_of(3, 299, False)])
def test_random_neurons_fill_the_budget(budget):
    found = random_split(PLAN, budget, seed=3)
    assert budget - 4 * 3 * 512 - 3 * 512 < PLAN.total_bytes(found.choice) <= budget
    on_gpu = found.hot[found.layer_on_gpu]
    assert on_gpu.max() - on_gpu.min() <= 1 and (found.hot[~found.layer_on_gpu] == 0).all()
    assert (np.sort(found.order, axis=1) == np.arange(SPEC.d_ff)).all()
    assert (np.diff(found.order[:, :50], axis=1) != 1).any(axis=1).all()
    again, other = random_split(PLAN, budget, seed=3), random_split(PLAN, budget, seed=4)
    assert (again.order == found.order).all() and (other.order != found.order).any()


def test_everything_fits_in_what_it_takes():
    budget = PLAN.total_bytes(Placement.all_hot(SPEC).choice)
    for found in (whole_layers(PLAN, budget), random_split(PLAN, budget, 0)):
        assert (found.hot == SPEC.d_ff).all() and found.layer_on_gpu.all() and found.head_on_gpu


def test_a_budget_without_room_for_a_layer_is_refused():
    with pytest.raises(BudgetError, match=r"a whole layer takes \d+ with its workspace"):
        whole_layers(PLAN, budget_of(1, SPEC.d_ff, False) - 1)
    with pytest.raises(BudgetError, match="the dense parts of a layer takes"):
        random_split(PLAN, budget_of(1, 0, False) - 1, 0)
