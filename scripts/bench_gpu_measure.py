"""One measurement of `bench_gpu.py` in a process of its own: `bench_gpu_measure.py KIND JSON` prints one JSON line.

KIND is a function of `KINDS`, JSON its arguments. A process of its own gives back all memory, of the host and the GPU,
and its failure leaves the others alone.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpu_kernels.bandwidth import BandwidthProbe
from cpu_kernels.worker_pool import available_cpus
from hybrid.bench.ceiling import bytes_per_token
from hybrid.bench.devices import GpuFacts, PrefillWays, gpu_facts, gpu_result, gpu_runner
from hybrid.bench.measurements import Spread
from hybrid.console import progress
from hybrid.formats.bundle import EMBEDDED_MODEL, Bundle
from hybrid.formats.packed import PackedModel
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNCounters
from hybrid.model.loader import ModelFolder
from hybrid.offline.certify import certify
from hybrid.offline.project import Project
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.devices import hardware_of
from hybrid.runtime.engine import Engine
from placement.baselines import random_split
from placement.cost import CostModel
from placement.placement import Placement, PlacementSettings, place
from placement.plan import Choice, VramPlan
from placement.prefill import ColdPrefill
from placement.prompt import PromptTime
from placement.workspace import PREFILL_CHUNK
from predictor.bank import PredictorBank
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import Strategy
from profiler.machine.handoff import Handoff

Result = dict[str, Any]

_SAME_CONTEXT = 256  # of the check for the same tokens
_MOST_SECONDS = 12.0  # of the turns of one way to read a prompt, after which no other begins
_SHOWN_TOKENS = 32  # of an answer, kept to compare budgets


def handoff(threads: int, active: int) -> Result:
    """Seconds of a hand-off that is empty, and of one with `active` neurons."""
    with Handoff(torch.device("cuda"), threads) as made:
        return {"threads": threads, "active": active, "empty": made.seconds(), "full": made.seconds(active)}


@dataclass(frozen=True)
class Prepared:
    """A model folder with what its bundle holds."""

    folder: ModelFolder
    bundle: Bundle
    bank: PredictorBank
    firing: np.ndarray
    hardware: HardwareProfile

    @classmethod
    def of(cls, path: str) -> Prepared:
        folder = ModelFolder.open(Path(path))
        bundle = Bundle.of(folder.path, folder.spec)
        bank, profile = bundle.load_predictors(folder.spec), bundle.load_profile(folder.spec)
        return cls(folder, bundle, bank, profile.frequency(), hardware_of(bundle))

    @property
    def predicted_ratio(self) -> float:
        """Neurons predicted over neurons that fire."""
        return 1.0 if self.bank.report is None else max(1.0, self.bank.report.overall.active_ratio)

    def plan(self, context: int) -> VramPlan:
        return VramPlan(self.folder.spec, context, self.bank.bytes_per_layer)

    def seconds(self, placement: Placement, context: int) -> float:
        """Seconds of a token that the cost model expects with `context` tokens in the cache."""
        model = CostModel(self.plan(context), self.hardware, self.firing, "learned", self.predicted_ratio)
        return model.evaluate(placement.choice).seconds


def require_copies(path: Path, strategies: Sequence[str]) -> None:
    """Make the copies of rows that certified needs, where it is among `strategies` and they are not there."""
    project = Project(path, None, None, progress)
    if "certified" in strategies and not project.bundle.copies.is_file():
        certify(project, progress)


@dataclass
class Answers:
    """Runs of the same prompt: tokens of the last, intervals in seconds of all, and counters summed over them."""

    tokens: list[int]
    runs: list[list[float]]
    first: list[float]
    counters: FFNCounters

    @property
    def steps(self) -> int:
        return sum(len(run) for run in self.runs)

    def summary(self) -> Result:
        intervals = [interval for run in self.runs for interval in run]
        speed = Spread.of([len(run) / sum(run) for run in self.runs])
        p50, p90, p99 = (float(value) for value in np.percentile(intervals, (50, 90, 99)))
        return {
            "speed": speed.p50,
            "speed_p20": speed.p20,
            "speed_p80": speed.p80,
            "tpot_p50": p50,
            "tpot_p90": p90,
            "tpot_p99": p99,
            "ttft": statistics.median(self.first),
            "intervals": len(intervals),
            "tokens": self.tokens[:_SHOWN_TOKENS],
        }


def prompt_of(engine: Engine, length: int) -> list[int]:
    """Random tokens, none of which is a special one of the synthetic models."""
    found: list[int] = np.random.default_rng(0).integers(16, engine.model.spec.vocab_size, length).tolist()
    return found


def answers(engine: Engine, prompt: int, tokens: int, runs: int) -> Answers:
    """Greedy answers to a random prompt, after a short one that does not count."""
    engine.end_tokens = frozenset()
    given, total = prompt_of(engine, prompt), FFNCounters()
    found = Answers([], [], [], total)
    for count in (4, *[tokens] * runs):
        engine.reset()
        steps = list(engine.generate(given, SamplingSettings(temperature=0, max_new_tokens=count)))
        if count == 4:
            continue
        found.tokens = [step.token for step in steps]
        found.runs.append(np.diff([step.stats.decode_seconds for step in steps]).tolist())
        found.first.append(steps[0].stats.ttft_seconds)
        for name, value in vars(engine.runtime.counters).items():
            setattr(total, name, getattr(total, name) + value)
    return found


def decode(
    model: str,
    budget: int,
    context: int,
    prompt: int,
    tokens: int,
    runs: int,
    placement: str = "solved",
    sparsity: Strategy = "learned",
) -> Result:
    """Speed, latency, ceiling, prediction and memory of a model within a budget of bytes."""
    prepared = Prepared.of(model)
    require_copies(Path(model), [sparsity])
    facts = gpu_facts(torch.device("cuda", 0), prepared.bundle, prepared.folder.spec, budget)
    given = random_split(prepared.plan(context), budget, 0) if placement == "random" else None
    config = EngineConfig(sparsity, context=context, vram_budget=budget)
    with Engine.load(model, config, placement=given) as engine:
        probe = BandwidthProbe(engine.runtime.pool)
        before = probe.measure()
        found = answers(engine, prompt, tokens, runs)
        host = statistics.mean((before, probe.measure()))
        rates = {"cpu_rate": host, "gpu_rate": facts.read_bandwidth, "handoff": facts.handoff_seconds}
        result = found.summary() | rates | {"threads": engine.runtime.pool.threads, "context": context}
        position = prompt + tokens / 2
        if gpu_runner(engine) is None:
            result |= _on_cpu(engine, prepared, found, position, host)
        else:
            result |= _on_both(engine, facts, found, position, host)
    result["share"] = result["speed"] / result["ceiling"]
    if result["predicted"]:
        result["error"] = result["speed"] / result["predicted"] - 1  # of the predicted time per token
    return result


def _on_cpu(engine: Engine, prepared: Prepared, found: Answers, position: float, host: float) -> Result:
    read = sum(bytes_per_token(engine.model, engine.runtime.strategy, found.counters, position).values())
    alone = Placement.all_cold(engine.model.spec)
    predicted = 1 / prepared.seconds(alone, round(position)) if engine.runtime.strategy == "learned" else None
    memory = {"planned": 0, "arena": 0, "taken": 0, "hot_share": 0.0, "layers_on_gpu": 0, "hot_neurons": 0.0}
    return memory | {"cpu_bytes": read, "gpu_bytes": 0, "ceiling": host / read, "predicted": predicted}


def _on_both(engine: Engine, facts: GpuFacts, found: Answers, position: float, host: float) -> Result:
    """Reads the longest prompt first, after which the memory is what it ever takes."""
    strategy, placement = engine.runtime.strategy, engine.placement
    engine.reset()
    next(engine.generate(prompt_of(engine, engine.context - 1), SamplingSettings(temperature=0, max_new_tokens=1)))
    torch.cuda.synchronize()
    about = gpu_result(engine, facts, {strategy: found.counters}, {}, position, round(position))
    step, seconds = about.steps[strategy], about.predicted.get(strategy)
    return {
        "planned": about.planned,
        "arena": about.used,
        "taken": about.taken,
        "hot_share": found.counters.fired_hot / max(1, found.counters.fired),
        "layers_on_gpu": int(placement.layer_on_gpu.sum()),
        "hot_neurons": float(placement.hot.mean()) / engine.model.spec.d_ff,
        "cpu_bytes": step.cpu_bytes,
        "gpu_bytes": step.gpu_bytes,
        "handoffs": step.handoffs,
        "ceiling": 1 / step.seconds(about.machine(host)),
        "predicted": 1 / seconds if seconds else None,
    }


def prefill(model: str, budget: int, context: int, lengths: list[int], forced: bool = False, runs: int = 5) -> Result:
    """Seconds to read prompts, by the way that the cost model chooses and where `forced` by each way alone, beside what
    it expects: medians of turns, as one run differs from the next by a fifth. The CPU alone has one turn, as it takes
    many times as long."""
    rows = []
    with Engine.load(model, EngineConfig("learned", context=context, vram_budget=budget)) as engine:
        runner = gpu_runner(engine)
        for length in lengths:
            given = prompt_of(engine, length)
            times: dict[str, list[float]] = {}
            layers: dict[str, dict[str, int]] = {}
            turn = [("chosen", None), ("stream", 0.0)] if forced else [("chosen", None)]
            _read(engine, given, None)  # warms up
            for way, choice in [*turn * runs, *([("cpu", 1.0)] if forced else [])]:
                if sum(times.get(way, ())) < _MOST_SECONDS:
                    seconds, layers[way] = _read(engine, given, choice)
                    times.setdefault(way, []).append(seconds)
            expected = _expected(engine, length)
            cold = (engine.placement.layer_on_gpu & (engine.placement.hot < engine.model.spec.d_ff)).sum()
            passes = int(cold) * -(-length // PREFILL_CHUNK)
            for way, of_way in times.items():
                row = {"length": length, "way": way, "seconds": statistics.median(of_way), **layers[way]}
                row["split"] = max(0, row["streamed"] + row["computed"] - passes)
                if way == "chosen" and expected is not None:
                    row |= {"predicted": expected, "error": expected / row["seconds"] - 1}
                rows.append(row)
        threads = engine.runtime.pool.threads
        return {"rows": rows, "notices": list(engine.notices), "on_gpu": runner is not None, "threads": threads}


def _read(engine: Engine, prompt: list[int], cpu_share: float | None) -> tuple[float, dict[str, int]]:
    """Seconds to the first token after a prompt, and layers by the way that they went."""
    runner, before = gpu_runner(engine), PrefillWays.so_far(engine)
    if runner is not None:
        runner.prefill.cpu_share = cpu_share
    engine.reset()
    step = next(engine.generate(prompt, SamplingSettings(temperature=0, max_new_tokens=1)))
    return step.stats.ttft_seconds, vars(PrefillWays.so_far(engine).since(before)).copy()


def _expected(engine: Engine, length: int) -> float | None:
    """Seconds that the cost model expects for a prompt."""
    runner, runtime, spec = gpu_runner(engine), engine.runtime, engine.model.spec
    if runner is not None:
        return runner.expected_seconds(length)
    hardware = hardware_of(engine.plan.bundle).with_threads(runtime.pool.threads)
    cost = ColdPrefill(hardware, spec, runtime.precision, runtime.few)
    return PromptTime(cost, Choice.all_cpu(spec.n_layers), ()).seconds_alone(length, engine.runner.chunk)


def predict(model: str, budgets: list[int], context: int, position: int) -> Result:
    """Tokens/s that the cost model expects over budgets, each with the solver's placement."""
    prepared, rows = Prepared.of(model), []
    for budget in budgets:
        settings = PlacementSettings(budget, context, "learned", predicted_ratio=prepared.predicted_ratio)
        hardware = replace(prepared.hardware, vram_bytes=max(budget, prepared.hardware.vram_bytes))
        sizes = prepared.bank.bytes_per_layer
        found = place(prepared.folder.spec, hardware, prepared.firing, sizes, settings)
        rows.append({"budget": budget, "speed": 1 / prepared.seconds(found.placement, position)})
    return {"rows": rows}


def same_tokens(
    strategies: list[str], threads: list[int], prompt: int, tokens: int, model: str | None = None
) -> Result:
    """How many engines, over placements, strategies and workers, answer as the CPU alone does, and as dense does."""
    path = Path(model) if model else EMBEDDED_MODEL
    folder = ModelFolder.open(path)
    order = folder.weights.order if isinstance(folder.weights, PackedModel) else None
    threads = [count for count in threads if count < available_cpus()] or [1]
    alone = Placement.all_cold(folder.spec) if order is None else replace(Placement.all_cold(folder.spec), order=order)
    require_copies(path, strategies)
    truth = {s: _greedy(path, s, alone, threads[-1], prompt, tokens, 0) for s in dict.fromkeys(["dense", *strategies])}
    total = as_alone = as_dense = 0
    differing = []
    for strategy in strategies:
        for label, workers, placement in _placements(folder, order, threads):
            got = _greedy(path, strategy, placement, workers, prompt, tokens, None)
            total, as_alone = total + 1, as_alone + (got == truth[strategy])
            as_dense += got == truth["dense"]
            if got != truth[strategy]:
                differing.append(f"{strategy}, {label}, {workers} workers")
    return {
        "engines": total,
        "as_cpu": as_alone,
        "as_dense": as_dense,
        "differing": differing,
        "tokens": tokens,
        "threads": threads,
        "strategies": strategies,
    }


def _placements(
    folder: ModelFolder, order: np.ndarray | None, threads: list[int]
) -> Iterator[tuple[str, int, Placement]]:
    """Placements between nothing and everything on the GPU, one of them with each number of workers."""
    spec = folder.spec
    some, every = Placement.random(spec, 0.3, 0), Placement.all_hot(spec)
    on_gpu = np.arange(spec.n_layers) % 2 == 0
    hot = np.where(on_gpu, round(0.6 * spec.d_ff), 0).astype(np.int32)
    half = replace(some, hot=hot, layer_on_gpu=on_gpu, head_on_gpu=False)
    dense_parts = replace(some, hot=np.zeros(spec.n_layers, np.int32))
    fixed = [("some hot", count, some) for count in threads]
    fixed += [("no hot neuron", threads[-1], dense_parts), ("half the layers, no head", threads[-1], half)]
    for label, workers, placement in [*fixed, ("everything", threads[-1], every)]:
        yield label, workers, placement if order is None else replace(placement, order=order)


def _greedy(
    path: Path, strategy: str, placement: Placement, threads: int, prompt: int, tokens: int, budget: int | None
) -> list[int]:
    config = EngineConfig(strategy, context=_SAME_CONTEXT, threads=threads, vram_budget=budget)
    with _loaded(path, config, placement) as engine:
        engine.end_tokens = frozenset()
        settings = SamplingSettings(temperature=0, max_new_tokens=tokens)
        return [step.token for step in engine.generate(prompt_of(engine, prompt), settings)]


@contextmanager
def _loaded(path: Path, config: EngineConfig, placement: Placement) -> Iterator[Engine]:
    """An engine whose memory is given back."""
    with Engine.load(path, config, placement=placement) as engine:
        yield engine
    del engine
    gc.collect()
    torch.cuda.empty_cache()


KINDS: dict[str, Callable[..., Result]] = {
    each.__name__: each for each in (handoff, decode, prefill, predict, same_tokens)
}


if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](**json.loads(sys.argv[2]))))
