"""Multiple-choice knapsack: one option per class, least total cost, total size within a capacity.

Lagrangian relaxation gives a lower bound and reduced costs, rounding gives a feasible solution, and HiGHS gets only
the options that could still beat it (Kellerer, Pferschy and Pisinger, "Knapsack Problems", chapter 11).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_TOTAL = 1e4


@dataclass(frozen=True, eq=False)
class Knapsack:
    """`cost` float64 and `size` int64, both [classes, options]; option 0 of every class has size 0.

    Sizes grow along a row as far as its costs are finite; an infinite cost means that the option does not exist.
    A solution is int64 [classes], the option taken in each.
    """

    cost: np.ndarray
    size: np.ndarray
    capacity: int

    def total_cost(self, picks: np.ndarray) -> float:
        return float(self.cost[np.arange(len(picks)), picks].sum())

    def total_size(self, picks: np.ndarray) -> int:
        return int(self.size[np.arange(len(picks)), picks].sum())


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Optimum of the Lagrangian dual: no solution costs less than `bound`, or than `bound` + `reduced` of an option.

    multiplier: cost per unit of size. reduced: float64 [classes, options], at least 0.
    below, above: two solutions that are both optimal at the multiplier, one within the capacity and one not
    (the same when the capacity does not bind).
    """

    multiplier: float
    bound: float
    reduced: np.ndarray
    below: np.ndarray
    above: np.ndarray


def relax(problem: Knapsack) -> Relaxation:
    """Maximise the Lagrangian dual, which is concave and piecewise linear in the multiplier.

    Each solution is a line in the multiplier. Starting from the cheapest and the smallest solution, the two lines'
    crossing is either the maximum, or finds a solution that lies below it and replaces one of the two.
    """
    below = np.zeros(len(problem.cost), dtype=np.int64)
    above = problem.cost.argmin(axis=1)
    if problem.total_size(above) <= problem.capacity:
        below = above
    multiplier = 0.0
    while (excess := problem.total_size(above) - problem.total_size(below)) > 0:
        multiplier = (problem.total_cost(below) - problem.total_cost(above)) / excess
        crossing = problem.total_cost(below) + multiplier * problem.total_size(below)
        picks = (problem.cost + multiplier * problem.size).argmin(axis=1)
        if problem.total_cost(picks) + multiplier * problem.total_size(picks) >= crossing * (1 - 1e-13):
            break
        if problem.total_size(picks) <= problem.capacity:
            below = picks
        else:
            above = picks
    penalised = problem.cost + multiplier * problem.size
    least = penalised.min(axis=1)
    bound = float(least.sum()) - multiplier * problem.capacity
    return Relaxation(multiplier, bound, penalised - least[:, None], below, above)


def fill(problem: Knapsack, picks: np.ndarray) -> np.ndarray:
    """Change one class at a time, always the change that saves most and fits, until none saves anything.

    A solution a little over the capacity is first brought within it by the one change that costs least.
    """
    picks, rows = picks.copy(), np.arange(len(picks))
    spare = problem.capacity - problem.total_size(picks)
    while True:
        growth = problem.size - problem.size[rows, picks][:, None]
        saving = np.where(growth <= spare, problem.cost[rows, picks][:, None] - problem.cost, -np.inf)
        row, option = divmod(int(saving.argmax()), saving.shape[1])
        if spare >= 0 and saving[row, option] <= 0:
            return picks
        if saving[row, option] == -np.inf:
            return fill(problem, np.zeros_like(picks))  # no single change is enough; all at size 0 always fits
        spare -= int(growth[row, option])
        picks[row] = option


def round_relaxation(problem: Knapsack, relaxation: Relaxation) -> np.ndarray:
    """A feasible solution: go from `below` towards `above` class by class while it fits, then fill what is left."""
    picks = relaxation.below.copy()
    size = problem.total_size(picks)
    for row in np.flatnonzero(relaxation.below != relaxation.above):
        growth = int(problem.size[row, relaxation.above[row]] - problem.size[row, picks[row]])
        if size + growth <= problem.capacity:
            picks[row] = relaxation.above[row]
            size += growth
    return fill(problem, picks)


@contextlib.contextmanager
def _native_output_discarded() -> Iterator[None]:
    """Keep what native code writes to stdout off it: HiGHS prints debug lines that no option of scipy switches off."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def solve_reduced(
    problem: Knapsack, keep: np.ndarray, time_limit: float, relative_gap: float
) -> tuple[np.ndarray | None, float]:
    """Solve with HiGHS over the options marked in `keep` (bool [classes, options]).

    Returns the solution, None when there is none or none was found in `time_limit` seconds, and a lower bound on the
    cost of any solution made of these options (infinity when there is none). HiGHS works in floating point, so the
    solution can be over the capacity by a few parts in a million: `fill` puts that right.
    """
    # Imported here: it takes 0.4 s, and a chat that reads a placement solves nothing.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    rows, options = np.nonzero(keep)
    cost, size = problem.cost[rows, options], problem.size[rows, options]
    # HiGHS has absolute tolerances of 1e-6: totals of about 1e4 make them 1e-10 of the cost and of the capacity.
    cost_unit = float(np.where(keep, problem.cost, 0.0).max(axis=1).sum()) / _TOTAL
    size_unit = max(problem.capacity, 1) / _TOTAL
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(keep), len(rows)))
    lower = np.append(np.ones(len(keep)), -np.inf)
    upper = np.append(np.ones(len(keep)), problem.capacity / size_unit)
    with _native_output_discarded():
        result = milp(
            cost / cost_unit,
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack([one_each, csr_array(size[None, :] / size_unit)]), lower, upper),
            options={"time_limit": time_limit, "mip_rel_gap": relative_gap},
        )
    if result.status == 2:
        return None, np.inf
    bound = -np.inf if result.mip_dual_bound is None else result.mip_dual_bound * cost_unit
    if result.x is None:
        return None, bound
    picks = np.zeros(len(keep), dtype=np.int64)
    taken = result.x > 0.5
    picks[rows[taken]] = options[taken]
    return picks, bound
