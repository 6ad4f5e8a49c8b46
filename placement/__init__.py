"""Which neurons live where: byte-exact VRAM plan, cost model, solvers and the placement itself."""

from placement.cost import CostModel, StepTime
from placement.placement import Placement, PlacementResult, PlacementSettings, place
from placement.plan import UNLIMITED, Choice, VramPlan, parse_size
from placement.solve import Solution, solve_greedy, solve_milp

__all__ = [
    "UNLIMITED",
    "Choice",
    "CostModel",
    "Placement",
    "PlacementResult",
    "PlacementSettings",
    "Solution",
    "StepTime",
    "VramPlan",
    "parse_size",
    "place",
    "solve_greedy",
    "solve_milp",
]
