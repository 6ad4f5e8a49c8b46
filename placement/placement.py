"""`Placement`: the artefact that says which neurons, layers and head live on the GPU, and `place`, which makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from placement.cost import UNCERTAIN, CostModel
from placement.plan import UNLIMITED, Choice, VramPlan
from placement.solve import Solution, solve_greedy, solve_milp
from placement.workspace import ENGINE_ROWS, PREFILL_CHUNK, RUNTIME_RESERVE, SERVER_ROWS, predictor_bytes
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from profiler.common.artifact import ArtifactHeader, read_tensors, write_tensors
from profiler.common.errors import ArtifactError, BudgetError, InputError
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import ModelSpec, Strategy

KIND = "placement"
REPAIR = "hybrid place"
_DTYPES = {
    "order": np.int32, "hot": np.int32, "zero_copy": np.int32, "layer_on_gpu": np.bool_, "head_on_gpu": np.bool_
}  # fmt: skip

Solver = Literal["milp", "greedy"]


@dataclass(frozen=True, eq=False)
class Placement:
    """Where every part of a model lives.

    order: int32 [n_layers, d_ff], neuron ids of each layer; the first `hot[layer]` are on the GPU ("hot").
    hot: int32 [n_layers]. layer_on_gpu: bool [n_layers], where attention, KV cache and predictor of a layer are.
    zero_copy: int32 [n_layers], cold neurons, the first after the hot ones, whose rows the GPU reads from host memory
    itself, over PCIe, while the CPU computes the rest; where it is not given, none.
    made_from: budget, solver, prediction and whatever else the placement was made from; it steers nothing.
    """

    order: np.ndarray
    hot: np.ndarray
    layer_on_gpu: np.ndarray
    head_on_gpu: bool
    model_fingerprint: str
    made_from: dict[str, Any] = field(default_factory=dict)
    zero_copy: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        if not len(self.zero_copy):
            object.__setattr__(self, "zero_copy", np.zeros(len(self.hot), np.int32))

    @classmethod
    def all_hot(cls, spec: ModelSpec) -> Placement:
        """Everything on the GPU."""
        return cls._uniform(spec, spec.d_ff, True)

    @classmethod
    def all_cold(cls, spec: ModelSpec) -> Placement:
        """Everything on the CPU."""
        return cls._uniform(spec, 0, False)

    @classmethod
    def random(cls, spec: ModelSpec, share: float, seed: int) -> Placement:
        """`share` of each layer's neurons hot, chosen at random; attention and head on the GPU."""
        order = np.random.default_rng(seed).permuted(cls.all_hot(spec).order, axis=1)
        hot = np.full(spec.n_layers, round(share * spec.d_ff), dtype=np.int32)
        return cls(order, hot, np.ones(spec.n_layers, dtype=bool), True, spec.fingerprint)

    @classmethod
    def _uniform(cls, spec: ModelSpec, hot: int, on_gpu: bool) -> Placement:
        order = np.tile(np.arange(spec.d_ff, dtype=np.int32), (spec.n_layers, 1))
        hot_counts = np.full(spec.n_layers, hot, dtype=np.int32)
        return cls(order, hot_counts, np.full(spec.n_layers, on_gpu), on_gpu, spec.fingerprint)

    @property
    def choice(self) -> Choice:
        """The same decision as the plan and the cost model take it."""
        return Choice(self.hot.astype(np.int64), self.layer_on_gpu, self.head_on_gpu)

    def hot_firing_share(self, firing: np.ndarray) -> float:
        """Share of all firings that hot neurons serve, given frequencies [n_layers, d_ff]; 0 when nothing fires."""
        in_order = np.take_along_axis(firing, self.order.astype(np.int64), axis=1)
        is_hot = np.arange(firing.shape[1]) < self.hot[:, None]
        total = float(in_order.sum())
        return float(in_order[is_hot].sum()) / total if total else 0.0

    def table(self) -> str:
        """Text for people: per layer, where its attention is and how its neurons are divided."""
        lines = ["layer  attention  hot neurons  cold neurons"]
        for layer, hot in enumerate(self.hot.tolist()):
            where = "GPU" if self.layer_on_gpu[layer] else "CPU"
            lines.append(f"{layer:5}  {where:>9}  {hot:11,}  {self.order.shape[1] - hot:12,}")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write the artefact, atomically; raises `ArtifactError` when it cannot be written."""
        header = ArtifactHeader(KIND, self.model_fingerprint, self.made_from)
        tensors = {
            "order": self.order,
            "hot": self.hot,
            "zero_copy": self.zero_copy,
            "layer_on_gpu": self.layer_on_gpu,
            "head_on_gpu": np.array([self.head_on_gpu]),
        }
        write_tensors(path, header, tensors)

    @classmethod
    def load(cls, path: Path, spec: ModelSpec, repair: str = REPAIR) -> Placement:
        """Read the artefact of the model `spec`.

        Raises `ArtifactError` when it is missing, corrupt or contradicts itself, `ArtifactMismatchError` when it
        belongs to another model.
        """
        header, tensors = read_tensors(path, KIND, spec.fingerprint, repair)
        made_from = dict(header.made_from)
        if header.format_version == 1:  # which had it there
            tensors["zero_copy"] = _from_version_1(made_from.pop("zero_copy", []), spec.n_layers)
        if problem := _problem(tensors, spec):
            raise ArtifactError(f"{path} is corrupt: {problem}; rebuild it with: {repair}")
        head_on_gpu = bool(tensors.pop("head_on_gpu")[0])
        return cls(**tensors, head_on_gpu=head_on_gpu, model_fingerprint=spec.fingerprint, made_from=made_from)


def _from_version_1(zero_copy: Any, layers: int) -> np.ndarray:
    """The neurons that a version 1 file notes as zero-copy: none where it has no such note or is not of numbers."""
    are_counts = isinstance(zero_copy, list) and all(type(n) is int and 0 <= n < 2**31 for n in zero_copy)
    return np.array(zero_copy if are_counts and zero_copy else [0] * layers, np.int32)


def predictor_sizes(spec: ModelSpec, bank: PredictorBank | ProxyBank | None) -> tuple[int, ...]:
    """Bytes on the GPU of each layer's predictor, zeros without predictors: proxies are counted by the plan."""
    ranks = (
        [predictor.rank for predictor in bank.predictors] if isinstance(bank, PredictorBank) else [0] * spec.n_layers
    )
    return tuple(predictor_bytes(spec.d_model, spec.d_ff, rank) for rank in ranks)


def _problem(tensors: Mapping[str, np.ndarray], spec: ModelSpec) -> str | None:
    """What is wrong with the tensors of a placement of `spec`, or None."""
    layers = spec.n_layers
    shapes = {"order": (layers, spec.d_ff), "head_on_gpu": (1,)}
    shapes |= dict.fromkeys(("hot", "zero_copy", "layer_on_gpu"), (layers,))
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != {name: (shape, np.dtype(_DTYPES[name])) for name, shape in shapes.items()}:
        return f"its tensors are not those of {layers} layers of {spec.d_ff} neurons"
    hot, on_gpu, zero_copy = tensors["hot"], tensors["layer_on_gpu"], tensors["zero_copy"]
    if (np.sort(tensors["order"], axis=1) != np.arange(spec.d_ff)).any():
        return "a layer's neuron order is not a permutation"
    if ((hot < 0) | (hot > spec.d_ff)).any():
        return f"a layer's count of hot neurons is not in 0..{spec.d_ff}"
    if ((zero_copy < 0) | (zero_copy > spec.d_ff - hot)).any():
        return "a layer's count of zero-copy neurons is not in 0 to its cold ones"
    if (hot[~on_gpu] > 0).any() or (zero_copy[~on_gpu] > 0).any():
        return "a layer on the CPU has hot or zero-copy neurons"
    return None


@dataclass(frozen=True)
class PlacementSettings:
    """What to place for; `InputError` or `BudgetError` when a value makes no sense.

    vram_budget: bytes, `UNLIMITED` for all that the GPU has. context: tokens that the KV cache holds.
    strategy, predicted_ratio, uncertain, group_size: see `CostModel`. prefill_chunk, reserve, kv_tokens: see
    `VramPlan`. time_limit: seconds for the MILP solver.
    """

    vram_budget: int
    context: int
    strategy: Strategy = "exact"
    solver: Solver = "milp"
    predicted_ratio: float = 1.0
    uncertain: float = UNCERTAIN
    prefill_chunk: int = PREFILL_CHUNK
    reserve: int = RUNTIME_RESERVE
    group_size: int = 64
    time_limit: float = 8.0
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.vram_budget <= UNLIMITED:
            raise BudgetError(f"VRAM budget is {self.vram_budget} bytes, expected 0 to 1 PiB; choose another")
        if self.solver not in get_args(Solver):
            raise InputError(f"solver is {self.solver!r}, expected one of {', '.join(get_args(Solver))}")
        if not (math.isfinite(self.time_limit) and self.time_limit > 0):
            raise InputError(f"time limit is {self.time_limit} s, expected a positive number")

    def with_predictors(self, bank: PredictorBank | ProxyBank | None) -> PlacementSettings:
        """The same, with as many neurons predicted in vain as the report of `bank` says."""
        if bank is None or bank.report is None:
            return self
        return replace(self, predicted_ratio=max(1.0, bank.report.overall.active_ratio))

    def with_certificates(self, made_from: Mapping[str, Any]) -> PlacementSettings:
        """The same, with as many silent neurons named as were when copies `made_from` this were tried."""
        uncertain = made_from.get("uncertain")
        return replace(self, uncertain=uncertain) if isinstance(uncertain, float) and 0 <= uncertain <= 1 else self

    def planned_bytes(self, hardware: HardwareProfile) -> int:
        """The budget on `hardware`; `BudgetError` when it asks for more memory than the GPU has."""
        if self.vram_budget == UNLIMITED:
            return hardware.vram_bytes
        if self.vram_budget > hardware.vram_bytes:
            raise BudgetError(
                f"VRAM budget is {self.vram_budget} bytes, {hardware.name} has {hardware.vram_bytes}; "
                "ask for less, for unlimited, or plan with another hardware profile",
                setting="vram_budget",
            )
        return self.vram_budget


@dataclass(frozen=True, eq=False)
class PlacementResult:
    """A placement with the memory plan (name, bytes) and the solver's report behind it."""

    placement: Placement
    rows: list[tuple[str, int]]
    solution: Solution


def place(
    spec: ModelSpec,
    hardware: HardwareProfile,
    firing: np.ndarray,
    predictor_bytes: tuple[int, ...],
    settings: PlacementSettings,
    provenance: Mapping[str, Any] | None = None,
) -> PlacementResult:
    """Choose what goes to the GPU.

    firing: activation frequencies float64 [n_layers, d_ff]. predictor_bytes: per layer, zeros without predictors.
    provenance: recorded in the placement beside the settings and the prediction, such as the profile's hash.
    Raises `BudgetError`, `ContextError` or `InputError` when the inputs do not fit the model or the hardware.
    """
    budget = settings.planned_bytes(hardware)
    sizes = settings.prefill_chunk, settings.reserve
    rows = ENGINE_ROWS if settings.kv_tokens is None else SERVER_ROWS
    certified = settings.strategy == "certified"
    proxied = settings.strategy == "proxy"
    plan = VramPlan(spec, settings.context, predictor_bytes, *sizes, rows, settings.kv_tokens, certified, proxied)
    model = CostModel(
        *(plan, hardware, firing, settings.strategy, settings.predicted_ratio, settings.group_size),
        uncertain=settings.uncertain,
    )
    if settings.solver == "milp":
        solution = solve_milp(model, budget, settings.time_limit)
    else:
        solution = solve_greedy(model, budget)
    made_from = dict(provenance or {}) | _summary(settings, hardware, solution)
    choice = solution.choice
    zero_copy = model.zero_copy(choice) if choice.uses_gpu else np.zeros(spec.n_layers)
    counts = choice.hot.astype(np.int32), zero_copy.astype(np.int32)
    placement = Placement(
        *(model.order, counts[0], choice.layer_on_gpu, choice.head_on_gpu), spec.fingerprint, made_from, counts[1]
    )
    return PlacementResult(placement, plan.rows(choice), solution)


def _summary(settings: PlacementSettings, hardware: HardwareProfile, solution: Solution) -> dict[str, Any]:
    """What the artefact records of its making."""
    return {
        "vram_budget": settings.vram_budget,
        "context": settings.context,
        "kv_tokens": settings.kv_tokens,
        "strategy": settings.strategy,
        "hardware": hardware.name,
        "solver": solution.solver,
        "status": solution.status,
        "gap": solution.gap,
        "solver_seconds": solution.solver_seconds,
        "predicted_seconds_per_token": solution.seconds,
        "predicted_tokens_per_second": 1.0 / solution.seconds,
    }
