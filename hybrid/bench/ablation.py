"""`hybrid bench --ablation`: what each idea is worth on this machine, at one budget of GPU memory (PowerInfer's table).

    whole layers, dense      as many layers as fit are the GPU's, the others the CPU's, every neuron is computed
    + predictors             the same placement; predicted neurons only
    + split, random          dense parts on the GPU; random neurons of each layer beside them, the others the CPU's
    + the solver's placement the neurons, layers and head that `place` would choose

Same weights, prompt, number of tokens and budget. The first two take turns run by run; the others need the memory, so
they are loaded one after another and everything of the one before is freed.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import click
import torch

from cpu_kernels.bandwidth import BUFFER_BYTES
from hybrid.bench.bench import Bench, BenchConfig, engine_settings, facts_of, setting_of
from hybrid.bench.devices import GpuFacts
from hybrid.bench.measurements import Spread, append_csv
from hybrid.bench.report import BenchResult, agreement
from hybrid.console import counted, percent, progress, size, table
from hybrid.errors import BudgetError, InputError
from hybrid.formats.bundle import EMBEDDED_MODEL, Bundle
from hybrid.model.loader import ModelFolder
from hybrid.runtime.engine import Engine
from placement.baselines import random_split, whole_layers
from placement.placement import Placement
from placement.plan import UNLIMITED, VramPlan, parse_size
from placement.workspace import predictor_bytes
from predictor.bank import PredictorBank
from profiler.common.spec import ModelSpec, Strategy

WHOLE, PREDICTORS, RANDOM, SOLVED = "whole layers, dense", "+ predictors", "+ split, random", "+ the solver's placement"
Load = Callable[[Placement | None], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class AblationRow:
    """One row. hot_share: of neurons predicted, those on the GPU, None where none are predicted; expected_hot_share: of
    firings by the profile. agreement: share of tokens that are dense's. Layers, and bytes of GPU memory planned."""

    name: str
    speed: Spread
    tpot_ms: float
    share_of_ceiling: float | None
    hot_share: float | None
    expected_hot_share: float | None
    agreement: float
    layers_on_gpu: int
    hot_neurons: int
    head_on_gpu: bool
    vram_planned: int
    vram_taken: int | None


class Ablation:
    """The rows, one load after another. `load` makes an engine by a placement; None is the solver's own."""

    def __init__(self, load: Load, plan: VramPlan, budget: int, config: BenchConfig, facts: GpuFacts) -> None:
        """Raises `BudgetError` where the budget is too small for a whole layer."""
        self._load, self._config, self._facts = load, config, facts
        whole, drawn = whole_layers(plan, budget), random_split(plan, budget, config.seed)
        self._loads: list[tuple[Placement | None, dict[Strategy, str]]] = [
            (whole, {"dense": WHOLE, "learned": PREDICTORS}),
            (drawn, {"learned": RANDOM}),
            (None, {"learned": SOLVED}),
        ]
        self._rows: list[AblationRow] = []
        self._truth: BenchResult | None = None

    @property
    def turns(self) -> int:
        """How often `run` calls its `advance`."""
        return self._config.runs * sum(len(names) for _, names in self._loads)

    def run(self, advance: Callable[[int], None], probe_bytes: int = BUFFER_BYTES) -> list[AblationRow]:
        """Measure all; `advance` is called with 1 after each run. `probe_bytes`: see `Bench`."""
        for placement, names in self._loads:
            self._measure(placement, names, advance, probe_bytes)
            free_gpu()
        return self._rows

    def _measure(
        self,
        placement: Placement | None,
        names: Mapping[Strategy, str],
        advance: Callable[[int], None],
        probe_bytes: int,
    ) -> None:
        with self._load(placement) as engine:
            config = replace(self._config, strategies=tuple(names))
            bench = Bench(engine, config, probe_bytes=probe_bytes, gpu=self._facts)
            result = bench.run(advance)
            self._truth = self._truth or result
            self._rows += [self._row(engine, result, strategy, name) for strategy, name in names.items()]

    def _row(self, engine: Engine, result: BenchResult, strategy: Strategy, name: str) -> AblationRow:
        summary, placed, frequency = result.summaries[strategy], engine.placement, self._facts.firing.frequency
        truth = cast("BenchResult", self._truth).runs["dense"][0]
        return AblationRow(
            name,
            summary.speed,
            summary.tpot[0],
            summary.share_of_ceiling,
            summary.hot_share,
            None if frequency is None else placed.hot_firing_share(frequency),
            agreement(result.runs[strategy][0], truth),
            int(placed.layer_on_gpu.sum()),
            int(placed.hot.sum()),
            placed.head_on_gpu,
            0 if result.gpu is None else result.gpu.planned,
            None if result.gpu is None else result.gpu.taken,
        )


def free_gpu() -> None:
    """Give what a closed engine held back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ablation_report(rows: Sequence[AblationRow], setting: Mapping[str, Any], budget: int, gpu: str) -> str:
    """The table, medians, and the solver's speed over random."""
    head = (
        f"{setting['model']}, {setting['dtype']}, {counted(setting['threads'], 'thread')} of {setting['machine']}, "
        f"{gpu}\n"
        f"{size(budget)} of GPU memory, {setting['prompt_tokens']} + {setting['tokens']} tokens"
    )
    header = ["medians", "tok/s", "p20 to p80", "over the first", "of ceiling", "on the GPU", "by profile", "as dense"]
    cells: list[list[object]] = [
        [
            row.name,
            f"{row.speed.p50:.1f}",
            f"{row.speed.p20:.1f} to {row.speed.p80:.1f}",
            f"{row.speed.p50 / rows[0].speed.p50:.2f}",
            percent(row.share_of_ceiling),
            percent(row.hot_share),
            percent(row.expected_hot_share),
            percent(row.agreement),
        ]
        for row in rows
    ]
    memory = [
        [row.name, row.layers_on_gpu, f"{row.hot_neurons:,}", "GPU" if row.head_on_gpu else "CPU",
         size(row.vram_planned), "-" if row.vram_taken is None else size(row.vram_taken)]
        for row in rows
    ]  # fmt: skip
    return "\n\n".join(
        [
            head,
            table(header, cells),
            "on the GPU: share of the neurons predicted that the GPU computed; by profile: of firings in the corpus",
            table(["", "layers on the GPU", "hot neurons", "head", "planned", "taken"], memory),
            f"solver over random: {over_random(rows):.2f}",
        ]
    )


def over_random(rows: Sequence[AblationRow]) -> float:
    """The solver's median speed over that of random neurons."""
    speeds = {row.name: row.speed.p50 for row in rows}
    return speeds[SOLVED] / speeds[RANDOM]


def ablation_csv(
    rows: Sequence[AblationRow], setting: Mapping[str, Any], budget: int, gpu: str
) -> list[dict[str, Any]]:
    """One row per placement and strategy."""
    found = []
    for row in rows:
        speed = {f"tokens_per_second_{name}": value for name, value in asdict(row.speed).items()}
        rest = {name: value for name, value in asdict(row).items() if name not in ("name", "speed")}
        found.append({**setting, "gpu": gpu, "vram_budget": budget, "case": row.name, **speed, **rest})
    return found


def ablation_json(rows: Sequence[AblationRow], setting: Mapping[str, Any], budget: int, facts: GpuFacts) -> str:
    """Everything measured, on one line."""
    more = {"gpu": facts.name, "gpu_bandwidth": facts.read_bandwidth, "vram_budget": budget}
    found = {"rows": [asdict(row) for row in rows], "solver_over_random": over_random(rows)}
    return json.dumps({**setting, **more, **found})


def bank_plan(spec: ModelSpec, context: int | None, bank: PredictorBank) -> VramPlan:
    """The plan of a model's memory with these predictors."""
    sizes = tuple(predictor_bytes(spec.d_model, spec.d_ff, predictor.rank) for predictor in bank.predictors)
    return VramPlan(spec, context or spec.max_context, sizes)


def ablation_budget(options: Mapping[str, Any]) -> int:
    """The budget in bytes. Raises `InputError` or `BudgetError` for options that do not go with an ablation."""
    if not torch.cuda.is_available():
        raise BudgetError("--ablation compares placements on a GPU, and there is none here that torch can use")
    for name in ("sparsity", "peer", "peer_model"):
        if options[name] is not None:
            raise InputError(f"--ablation chooses what it compares; leave --{name.replace('_', '-')} out")
    budget = 0 if options["vram_budget"] is None else parse_size(options["vram_budget"])
    if budget in (0, UNLIMITED):
        raise BudgetError("--ablation compares placements within a budget; give one such as --vram-budget 8GiB")
    return budget


def ablation(model: Path | None, options: Mapping[str, Any]) -> None:
    """The command: load and run each row, print the table, then one JSON line; add rows to the CSV where asked."""
    budget = ablation_budget(options)
    config = BenchConfig((), *(options[name] for name in ("prompt_tokens", "tokens", "runs", "seed")))
    settings, path = engine_settings("learned", options), model or EMBEDDED_MODEL
    folder = ModelFolder.open(path).with_kv(settings.kv)
    require_free_order(folder)
    bank = Bundle.of(folder.path, folder.spec, settings.bundle).load_predictors(folder.spec)
    facts = cast("GpuFacts", facts_of(path, settings))
    plan = bank_plan(folder.spec, settings.context, bank)
    setting: dict[str, Any] = {}

    def load(placement: Placement | None) -> Engine:
        engine = Engine.load(path, settings, placement, bank)
        setting.update(setting_of(model, engine, config))
        return engine

    runner = Ablation(load, plan, budget, config, facts)
    with progress("ablation", runner.turns, "run") as advance:
        rows = runner.run(advance)
    if options["csv"]:
        append_csv(options["csv"], ablation_csv(rows, setting, budget, facts.name))
    as_json = options["json"]
    click.echo(
        ablation_json(rows, setting, budget, facts) if as_json else ablation_report(rows, setting, budget, facts.name)
    )


def require_free_order(folder: ModelFolder) -> None:
    """Raise `InputError` for a model whose neurons cannot be drawn at random, or that has no sparse operators."""
    if folder.is_packed:
        raise InputError(
            f"{folder.path} is packed, its neurons lie in the solver's order; give the model that it was packed from"
        )
    if not folder.spec.fires_sparsely:
        raise InputError(
            f"{folder.spec.activation} fires densely, so --ablation has nothing to compare; use another model"
        )
