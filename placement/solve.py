"""Solvers: choose what goes to the GPU within a budget, by PowerInfer's greedy policy or exactly.

Within a layer the best hot set is a prefix of the frequency order, so a layer is one choice among "on the CPU" and
"on the GPU with k hot groups": a multiple-choice knapsack over layers and head.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from placement.cost import CostModel
from placement.knapsack import Knapsack, Relaxation, fill, relax, round_relaxation, solve_reduced
from placement.plan import ALIGNMENT, Choice

Status = Literal["optimal", "time limit", "greedy"]


@dataclass(frozen=True, eq=False)
class Solution:
    """A choice and how good it is.

    seconds: predicted time of a decode step. lower_bound: no choice within the budget takes less.
    columns, columns_left: options before, and after leaving out those that cannot be part of a better solution.
    """

    choice: Choice
    solver: str
    status: Status
    seconds: float
    lower_bound: float
    solver_seconds: float
    columns: int
    columns_left: int

    @property
    def gap(self) -> float:
        """Share of `seconds` that a better choice could save at most."""
        return max(0.0, 1.0 - self.lower_bound / self.seconds)


def solve_greedy(model: CostModel, budget: int) -> Solution:
    """PowerInfer's policy (Song et al., SOSP 2024, without its communication constraint) within `budget` bytes.

    Dense parts in layer order while they fit, the head, then the most often firing groups of all those layers.
    The CPU alone is taken where it is predicted to be faster, as it can be with a budget of a few layers.
    """
    start = time.perf_counter()
    problem = _knapsack(model, budget)
    if problem is None:
        return _cpu_only(model, "greedy", start)
    choice = _faster(model, [_choice(model, _greedy_picks(model, problem)), Choice.all_cpu(model.plan.spec.n_layers)])
    columns = int(np.isfinite(problem.cost).sum())
    bound = min(relax(problem).bound, _cpu_seconds(model))
    return _solution(model, choice, "greedy", "greedy", bound, start, columns, columns)


def solve_milp(model: CostModel, budget: int, time_limit: float = 8.0, relative_gap: float = 1e-4) -> Solution:
    """Least predicted time within `budget` bytes, exact up to `relative_gap` unless `time_limit` seconds pass.

    Never worse than `solve_greedy`. Options whose reduced cost shows that they cannot beat the best solution
    found by rounding are left out, which loses no optimum; HiGHS solves what remains.
    """
    start = time.perf_counter()
    problem = _knapsack(model, budget)
    if problem is None:
        return _cpu_only(model, "milp", start)
    relaxation = relax(problem)
    candidates = [round_relaxation(problem, relaxation), fill(problem, _greedy_picks(model, problem))]
    best = min(candidates, key=problem.total_cost)
    keep = _could_improve(problem, relaxation, best)
    bound = min(relaxation.bound, problem.total_cost(best))
    if problem.total_cost(best) - bound > relative_gap * problem.total_cost(best):
        left = max(0.1, time_limit - (time.perf_counter() - start))
        picks, milp_bound = solve_reduced(problem, keep, left, relative_gap)
        bound = min(max(bound, milp_bound), problem.total_cost(best))
        if picks is not None:
            best = min(best, fill(problem, picks), key=problem.total_cost)
    choice = _faster(model, [_choice(model, best), Choice.all_cpu(model.plan.spec.n_layers)])
    bound = min(bound, _cpu_seconds(model))
    gap = 1.0 - bound / model.evaluate(choice).seconds
    status: Status = "optimal" if gap <= max(relative_gap, 1e-9) * 1.01 else "time limit"
    columns = int(np.isfinite(problem.cost).sum())
    return _solution(model, choice, "milp", status, bound, start, columns, int(keep.sum()))


def _knapsack(model: CostModel, budget: int) -> Knapsack | None:
    """The knapsack over layers and head, or None when the GPU cannot be used at all."""
    capacity = budget - model.plan.workspace_bytes
    if not model.hardware.has_gpu or capacity < ALIGNMENT:
        return None
    # All sizes are multiples of the alignment: rounding down loses nothing and helps the solver's bounds.
    return Knapsack(*model.columns(), capacity // ALIGNMENT * ALIGNMENT)


def _could_improve(problem: Knapsack, relaxation: Relaxation, best: np.ndarray) -> np.ndarray:
    """Options bool [classes, options] that a solution cheaper than `best` could contain."""
    return relaxation.bound + relaxation.reduced < problem.total_cost(best)


def _greedy_picks(model: CostModel, problem: Knapsack) -> np.ndarray:
    """Options int64 [n_layers + 1] of the greedy policy: 0 is the CPU, 1 + k the GPU with k hot groups."""
    picks = np.zeros(len(problem.size), dtype=np.int64)
    spare = problem.capacity
    for row in range(len(picks)):
        if problem.size[row, 1] > spare:
            break
        picks[row] = 1
        spare -= int(problem.size[row, 1])
    growth = np.diff(problem.size[:-1, 1:], axis=1)
    frequency = np.add.reduceat(-np.sort(-model.firing, axis=1), model.group_counts[:-1], axis=1)
    # Rounding must not make a later group of a layer seem hotter; equally hot ones keep their order (stable sort).
    frequency = np.minimum.accumulate(frequency / np.diff(model.group_counts), axis=1)
    for index in np.argsort(-frequency, axis=None, kind="stable"):
        row, group = divmod(int(index), growth.shape[1])
        if picks[row] == 1 + group and growth[row, group] <= spare:
            picks[row] += 1
            spare -= int(growth[row, group])
    return picks


def _choice(model: CostModel, picks: np.ndarray) -> Choice:
    layers = picks[:-1]
    return Choice(model.group_counts[np.maximum(layers - 1, 0)], layers > 0, bool(picks[-1]))


def _faster(model: CostModel, choices: list[Choice]) -> Choice:
    return min(choices, key=lambda choice: model.evaluate(choice).seconds)


def _cpu_seconds(model: CostModel) -> float:
    return model.evaluate(Choice.all_cpu(model.plan.spec.n_layers)).seconds


def _cpu_only(model: CostModel, solver: str, start: float) -> Solution:
    choice = Choice.all_cpu(model.plan.spec.n_layers)
    options = model.plan.spec.n_layers + 1
    return _solution(model, choice, solver, "optimal", _cpu_seconds(model), start, options, options)


def _solution(
    model: CostModel,
    choice: Choice,
    solver: str,
    status: Status,
    bound: float,
    start: float,
    columns: int,
    columns_left: int,
) -> Solution:
    seconds = model.evaluate(choice).seconds
    elapsed = time.perf_counter() - start
    return Solution(choice, solver, status, seconds, min(bound, seconds), elapsed, columns, columns_left)
