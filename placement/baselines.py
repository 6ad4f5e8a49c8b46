"""Placements that the solver's is held against, within the same bytes: whole layers, and neurons drawn at random."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from placement.placement import Placement
from placement.plan import Choice, VramPlan
from profiler.common.errors import BudgetError


def whole_layers(plan: VramPlan, budget: int) -> Placement:
    """As many layers as fit in `budget` bytes wholly on the GPU, the first ones, and the head where it fits as well.

    Raises `BudgetError` where not one layer fits.
    """
    spec = plan.spec

    def choice(layers: int, head: bool = False) -> Choice:
        on_gpu = np.arange(spec.n_layers) < layers
        return Choice(np.where(on_gpu, spec.d_ff, 0), on_gpu, head)

    found = choice(_most(plan, budget, spec.n_layers, choice, "a whole layer"))
    with_head = choice(int(found.layer_on_gpu.sum()), True)
    found = with_head if plan.total_bytes(with_head) <= budget else found
    return _placed(plan, budget, found, Placement.all_hot(spec).order, "whole layers")


def random_split(plan: VramPlan, budget: int, seed: int) -> Placement:
    """Dense parts of the layers on the GPU, the first ones as far as they fit in `budget` bytes, and the head where it
    fits; what is left holds neurons of those layers drawn at random, as many in each.

    Raises `BudgetError` where not one layer's dense parts fit.
    """
    spec = plan.spec
    none = np.zeros(spec.n_layers, np.int64)

    def dense(layers: int, head: bool = False) -> Choice:
        return Choice(none, np.arange(spec.n_layers) < layers, head)

    layers = _most(plan, budget, spec.n_layers, dense, "the dense parts of a layer")
    head = plan.total_bytes(dense(layers, True)) <= budget

    def split(neurons: int) -> Choice:
        hot = none.copy()
        hot[:layers] = neurons // layers + (np.arange(layers) < neurons % layers)
        return Choice(hot, np.arange(spec.n_layers) < layers, head)

    order = np.random.default_rng(seed).permuted(Placement.all_hot(spec).order, axis=1)
    found = split(_count(plan, budget, layers * spec.d_ff, split))
    return _placed(plan, budget, found, order, "random", seed=seed)


def _count(plan: VramPlan, budget: int, most: int, choice: Callable[[int], Choice]) -> int:
    """The largest of 0 to `most` whose choice takes at most `budget` bytes, which grow with it; -1 where none does."""
    return bisect_right(range(most + 1), budget, key=lambda number: plan.total_bytes(choice(number))) - 1


def _most(plan: VramPlan, budget: int, most: int, choice: Callable[[int], Choice], what: str) -> int:
    count = _count(plan, budget, most, choice)
    if count < 1:
        raise BudgetError(
            f"VRAM budget is {budget} bytes, {what} takes {plan.total_bytes(choice(1))} with its workspace; give more"
        )
    return count


def _placed(plan: VramPlan, budget: int, choice: Choice, order: np.ndarray, how: str, **settings: int) -> Placement:
    hot = choice.hot.astype(np.int32)
    made_from = {"solver": how, "vram_budget": budget, "context": plan.context, **settings}
    fingerprint = plan.spec.fingerprint
    return Placement(order, hot, choice.layer_on_gpu, choice.head_on_gpu, fingerprint, made_from)
