"""Solvers against brute force, against each other, and on the largest size asked of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from placement_cases import NO_GPU, ROUND_HARDWARE, random_model, small_spec

from placement import UNLIMITED, Choice, CostModel, VramPlan, solve_greedy, solve_milp
from placement.knapsack import Knapsack, fill, relax, round_relaxation, solve_reduced


def every_choice(model):
    """All choices at the granularity of the groups."""
    options = [(False, 0), *((True, int(count)) for count in model.group_counts)]
    for layers in itertools.product(options, repeat=model.plan.spec.n_layers):
        hot, on_gpu = np.array([count for _, count in layers]), np.array([gpu for gpu, _ in layers])
        for head in (False, True):
            yield Choice(hot, on_gpu, head)


def all_gpu_bytes(model):
    spec = model.plan.spec
    return model.plan.total_bytes(Choice(np.full(spec.n_layers, spec.d_ff), np.ones(spec.n_layers, bool), True))


@pytest.mark.parametrize("block", range(10))
def test_milp_matches_brute_force_and_greedy_is_no_better(block):
    for seed in range(20 * block, 20 * block + 20):
        model = random_model(seed)
        budget = int(np.random.default_rng(seed).uniform(0, 1.1) * all_gpu_bytes(model))
        feasible = (c for c in every_choice(model) if model.plan.total_bytes(c) <= budget)
        best = min(model.evaluate(choice).seconds for choice in feasible)
        milp, greedy = solve_milp(model, budget, relative_gap=0.0), solve_greedy(model, budget)
        for solution in (milp, greedy):
            assert model.plan.total_bytes(solution.choice) <= budget, seed
            assert solution.seconds == model.evaluate(solution.choice).seconds
            assert solution.lower_bound <= best * (1 + 1e-9), seed
        assert milp.status == "optimal" and milp.seconds <= best * (1 + 1e-9), seed
        assert greedy.seconds >= milp.seconds, seed


def random_knapsack(seed):
    """Costs that are neither convex nor monotone, with a few options missing; returns it and its optimum."""
    rng = np.random.default_rng(seed)
    classes, options = int(rng.integers(2, 6)), int(rng.integers(2, 6))
    size = np.cumsum(rng.integers(1, 2**20, (classes, options)), axis=1) * 512
    size[:, 0] = 0
    cost = rng.uniform(1e-5, 1e-3, (classes, options))
    cost[rng.random(cost.shape) < 0.1] = np.inf
    cost[:, 0] = rng.uniform(5e-4, 2e-3, classes)
    problem = Knapsack(cost, size, int(rng.uniform(0, 1) * size[:, -1].sum()) + 1)
    picks = (np.array(p) for p in itertools.product(range(options), repeat=classes))
    return problem, min(problem.total_cost(p) for p in picks if problem.total_size(p) <= problem.capacity)


@pytest.mark.parametrize("seed", range(40))
def test_highs_bound_rounding_and_reduced_costs(seed):
    problem, optimum = random_knapsack(seed)
    picks, bound = solve_reduced(problem, np.isfinite(problem.cost), 10.0, 0.0)
    assert problem.total_cost(fill(problem, picks)) == pytest.approx(optimum, rel=1e-9)
    assert bound == pytest.approx(optimum, rel=1e-9)
    relaxation = relax(problem)
    assert relaxation.bound <= optimum * (1 + 1e-12) and (relaxation.reduced >= 0).all()
    assert problem.total_size(relaxation.below) <= problem.capacity
    rounded = round_relaxation(problem, relaxation)
    assert problem.total_size(rounded) <= problem.capacity
    assert problem.total_cost(rounded) >= optimum * (1 - 1e-12)
    # Leaving out what the reduced costs rule out must keep an optimal solution.
    keep = relaxation.bound + relaxation.reduced <= optimum * (1 + 1e-9)
    assert solve_reduced(problem, keep, 10.0, 0.0)[1] == pytest.approx(optimum, rel=1e-9)


def test_reduced_problem_without_a_solution():
    problem = Knapsack(np.array([[3.0, 1.0], [3.0, 1.0]]), np.array([[0, 10], [0, 10]]), 10)
    picks, bound = solve_reduced(problem, np.array([[False, True], [False, True]]), 10.0, 0.0)
    assert picks is None and bound == np.inf


@pytest.mark.parametrize("picks", [[1, 1], [2, 2], [2, 0]])
def test_fill_brings_an_oversized_solution_within_the_capacity(picks):
    problem = Knapsack(np.array([[9.0, 5.0, 1.0], [9.0, 4.0, 3.0]]), np.array([[0, 6, 12], [0, 6, 30]]), 11)
    filled = fill(problem, np.array(picks))
    assert problem.total_size(filled) <= 11
    assert problem.total_cost(filled) in (5.0 + 9.0, 9.0 + 4.0)


@pytest.mark.parametrize("solve", [solve_greedy, solve_milp])
@pytest.mark.parametrize("budget", [0, 1, 511])
def test_budget_too_small_for_anything_gives_the_cpu(solve, budget):
    model = random_model(3)
    solution = solve(model, budget)
    assert not solution.choice.uses_gpu and solution.gap == 0
    assert solution.seconds == model.evaluate(Choice.all_cpu(model.plan.spec.n_layers)).seconds


@pytest.mark.parametrize("solve", [solve_greedy, solve_milp])
def test_unlimited_budget_on_a_fast_gpu_puts_everything_there(solve):
    hardware = replace(ROUND_HARDWARE, cpu_read_bandwidth=1e4)
    plan = VramPlan(small_spec(n_layers=3), 8, (0, 0, 0))
    choice = solve(CostModel(plan, hardware, np.full((3, 3), 0.5), "exact", group_size=2), UNLIMITED).choice
    assert choice.head_on_gpu and choice.layer_on_gpu.all() and (choice.hot == 3).all()


@pytest.mark.parametrize("solve", [solve_greedy, solve_milp])
def test_machine_without_a_gpu(solve):
    model = replace(random_model(5), hardware=NO_GPU)
    assert not solve(model, UNLIMITED).choice.uses_gpu


def test_greedy_takes_the_hottest_groups_of_all_layers():
    # Neurons of 3 x 128 x 4 = 1536 bytes, one a group; room for three beside the dense parts and the head.
    spec = small_spec(n_layers=2, d_model=128, d_ff=4)
    firing = np.array([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.7, 0.1]])
    hardware = replace(ROUND_HARDWARE, handoff_seconds=1e-9, cpu_read_bandwidth=1e4)
    model = CostModel(VramPlan(spec, 8, (0, 0), prefill_chunk=1), hardware, firing, "exact", group_size=1)
    dense = model.plan.total_bytes(Choice(np.array([0, 0]), np.array([True, True]), True))
    np.testing.assert_array_equal(solve_greedy(model, dense + 3 * 1536).choice.hot, [1, 2])
    np.testing.assert_array_equal(solve_greedy(model, dense + 4 * 1536 - 1).choice.hot, [1, 2])
    np.testing.assert_array_equal(solve_greedy(model, dense + 4 * 1536).choice.hot, [2, 2])
    below = solve_greedy(model, dense - 1).choice
    assert below.layer_on_gpu.all() and not below.head_on_gpu


@pytest.fixture(scope="module")
def largest_model():
    n_layers, d_ff, d_model = 96, 49152, 12288
    heads = {"n_heads": 96, "n_kv_heads": 96, "head_dim": 128}
    spec = small_spec(
        n_layers=n_layers, d_ff=d_ff, d_model=d_model, vocab_size=50272, dtype="f16", gated=False, **heads
    )
    rng = np.random.default_rng(0)
    firing = rng.random((n_layers, d_ff)) ** rng.uniform(2, 20, (n_layers, 1))
    hardware = replace(ROUND_HARDWARE, cpu_read_bandwidth=6e10, gpu_read_bandwidth=9e11, pcie_bandwidth=2.4e10)
    hardware = replace(hardware, handoff_seconds=1.5e-5, gpu_launch_seconds=2e-6, cpu_layer_seconds=5e-6)
    return CostModel(VramPlan(spec, 64, (0,) * n_layers), hardware, firing, "exact")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_largest_model_has_a_small_gap(largest_model, share):
    budget = int(share * largest_model.plan.spec.model_bytes)
    milp = solve_milp(largest_model, budget, time_limit=2.0)
    assert milp.gap < 1e-3
    assert milp.seconds <= solve_greedy(largest_model, budget).seconds
    assert largest_model.plan.total_bytes(milp.choice) <= budget
    assert milp.columns_left < milp.columns
