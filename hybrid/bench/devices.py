"""What `hybrid bench` knows and finds of an engine on two devices: the GPU's bandwidth, bytes by device, memory taken,
the prediction that the placement was made by, and how prefill computed cold neurons."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from hybrid.bench.ceiling import Firing, Machine, SplitBytes, split_bytes
from hybrid.console import details, size
from hybrid.formats.bundle import Bundle
from hybrid.model.ffn import FFNCounters
from hybrid.runtime.devices import taken_bytes
from hybrid.runtime.engine import Engine
from hybrid.runtime.runner import CpuRunner
from placement.cost import UNCERTAIN, CostModel
from placement.plan import UNLIMITED, VramPlan
from placement.workspace import predictor_bytes
from predictor.bank import PredictorBank
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import ModelSpec, Strategy

if TYPE_CHECKING:
    from hybrid.runtime.gpu.runner import GpuRunner

# A hand-off without neurons as measured on an H200, for machines that were not measured.
HANDOFF_SECONDS = 13.3e-6
PROBE_BYTES = 2**30
_LEAST_PROBE_BYTES = 64 * 2**20
_COLUMNS, _READS, _PASSES = 4096, 10, 5


@dataclass(frozen=True, eq=False)
class GpuFacts:
    """What is known before the runs.

    read_bandwidth: bytes/s of one kernel. budget: bytes, None where none was given. free_before: bytes of the GPU that
    were free before the engine was loaded, None where there is no GPU, as in tests. hardware: the profile measured on
    this machine, None where there is none.
    """

    name: str
    read_bandwidth: float
    handoff_seconds: float
    firing: Firing
    budget: int | None = None
    free_before: int | None = None
    hardware: HardwareProfile | None = None


@dataclass(frozen=True)
class PrefillWays:
    """Layers by how prefill computed them: cold neurons streamed, computed by the CPU, both for a layer that is split;
    the whole layer on the CPU. Each counts once per chunk."""

    streamed: int = 0
    computed: int = 0
    on_cpu: int = 0

    @classmethod
    def so_far(cls, engine: Engine) -> PrefillWays:
        """Of all of an engine's prompts; all 0 for one on the CPU alone."""
        runner = gpu_runner(engine)
        return cls() if runner is None else cls(**asdict(runner.prefill.counters))

    def since(self, before: PrefillWays) -> PrefillWays:
        return PrefillWays(
            *(now - then for now, then in zip(asdict(self).values(), asdict(before).values(), strict=True))
        )


@dataclass(frozen=True, eq=False)
class GpuResult:
    """What was found.

    planned: bytes by the plan; used: bytes that the runtime cut for its tensors; taken: bytes that the GPU has less
    free than before, None where there is no GPU. By strategy: steps, bytes of a token on each device; prefill, of one
    run; predicted, seconds per token at the runs' positions, for a placement that was solved for this machine.
    predicted_ttft: seconds to the first token of whichever strategy, as a prompt is dense; None where the machine was
    not measured or the prompt goes through the decode step.
    promised: tokens/s that the placement says of itself, at a full context, for the strategy `promised_for`.
    """

    facts: GpuFacts
    planned: int
    used: int
    taken: int | None
    steps: dict[str, SplitBytes]
    prefill: dict[str, PrefillWays]
    predicted: dict[str, float]
    promised: float | None
    promised_for: str | None
    predicted_ttft: float | None = None

    def machine(self, host_bandwidth: float) -> Machine:
        return Machine(self.facts.read_bandwidth, host_bandwidth, self.facts.handoff_seconds)

    def memory(self) -> str:
        """Text: bytes planned beside bytes taken."""
        budget = self.facts.budget
        taken = "not known" if self.taken is None else f"{size(self.taken)} ({self.taken / self.planned - 1:+.1%})"
        rows = [
            ("budget", "none given" if budget is None else "unlimited" if budget == UNLIMITED else size(budget)),
            ("planned", size(self.planned)),
            ("tensors of the runtime", size(self.used)),
            ("taken by the process", taken),
        ]
        return details("GPU memory", rows)

    def as_json(self) -> dict[str, Any]:
        """Types of JSON."""
        facts = self.facts
        return {
            "name": facts.name,
            "read_bandwidth": facts.read_bandwidth,
            "handoff_seconds": facts.handoff_seconds,
            "vram_budget": facts.budget,
            "vram_planned": self.planned,
            "vram_tensors": self.used,
            "vram_taken": self.taken,
            "prefill": {name: asdict(ways) for name, ways in self.prefill.items()},
            "predicted_seconds": self.predicted,
            "predicted_ttft_seconds": self.predicted_ttft,
            "placement_tokens_per_second": self.promised,
            "placement_strategy": self.promised_for,
        }

    def columns(self, name: str) -> dict[str, Any]:
        """A CSV row's columns for a strategy; empty for a peer."""
        facts, step, ways = self.facts, self.steps.get(name), self.prefill.get(name)
        return {
            "gpu": facts.name,
            "vram_budget": facts.budget,
            "vram_planned": self.planned,
            "vram_tensors": self.used,
            "vram_taken": self.taken,
            "gpu_bandwidth": facts.read_bandwidth,
            "handoff_seconds": facts.handoff_seconds,
            "gpu_bytes_per_token": step.gpu_bytes if step else None,
            "cpu_bytes_per_token": step.cpu_bytes if step else None,
            "handoffs": step.handoffs if step else None,
            "predicted_seconds": self.predicted.get(name),
            "prefill_streamed": ways.streamed if ways else None,
            "prefill_computed": ways.computed if ways else None,
            "prefill_on_cpu": ways.on_cpu if ways else None,
            "predicted_ttft_ms": 1e3 * self.predicted_ttft if ways and self.predicted_ttft else None,
        }


def gpu_runner(engine: Engine) -> GpuRunner | None:
    """The engine's runner on two devices; None for one on the CPU alone."""
    return None if isinstance(engine.runner, CpuRunner) else cast("GpuRunner", engine.runner)


def gpu_facts(gpu: torch.device, bundle: Bundle, spec: ModelSpec, budget: int | None) -> GpuFacts:
    """Measure the GPU, before an engine takes its memory, and read what the artefacts know."""
    name = torch.cuda.get_device_name(gpu)
    free = torch.cuda.mem_get_info(gpu)[0]
    bandwidth = gpu_read_bandwidth(gpu, max(_LEAST_PROBE_BYTES, min(PROBE_BYTES, free // 2, budget or PROBE_BYTES)))
    hardware = measured_hardware(bundle, name)
    handoff = HANDOFF_SECONDS if hardware is None else hardware.handoff_seconds
    return GpuFacts(name, bandwidth, handoff, known_firing(bundle, spec), budget, free, hardware)


def measured_hardware(bundle: Bundle, gpu: str) -> HardwareProfile | None:
    """The bundle's hardware profile if it was measured on a machine with this GPU."""
    if not bundle.hardware.is_file():
        return None
    found = HardwareProfile.load(bundle.hardware)
    return found if found.source == "measured" and found.name.startswith(gpu) else None


def known_firing(bundle: Bundle, spec: ModelSpec) -> Firing:
    """What the profile and the predictors of a bundle say, where they are there."""
    if bundle.proxy.is_file() and not spec.fires_sparsely:
        return Firing(bundle.load_proxies(spec).frequency())
    frequency = bundle.load_profile(spec, samples=False).frequency() if bundle.profile.is_file() else None
    report = PredictorBank.load(bundle.predictors, spec).report if bundle.predictors.is_file() else None
    ratio = 1.0 if report is None else max(1.0, report.overall.active_ratio)
    made = bundle.copies_header(spec).made_from if bundle.has_copies(spec) else {}
    return Firing(frequency, ratio, made.get("uncertain", UNCERTAIN))


def gpu_read_bandwidth(gpu: torch.device, count: int = PROBE_BYTES) -> float:
    """Bytes/s that a kernel reads from `count` bytes: the faster of torch's sum and our GEMV, the median of passes.

    Nothing of it stays on the GPU but loaded kernels.
    """
    found = max(_read_bandwidths(gpu, count))
    torch.cuda.empty_cache()
    return found


def _read_bandwidths(gpu: torch.device, count: int) -> list[float]:
    from gpu_kernels.gemv import gemv
    from gpu_kernels.matrix import DeviceMatrix

    weights = torch.ones(count // (2 * _COLUMNS), _COLUMNS, dtype=torch.bfloat16, device=gpu)
    matrix, x = DeviceMatrix(weights, _COLUMNS, "bf16"), torch.ones(1, _COLUMNS, device=gpu)
    out, words = torch.empty(1, len(weights), device=gpu), weights.view(torch.float32)
    readers = (lambda: gemv(matrix, x, None, out), lambda: torch.sum(words))
    return [weights.nbytes / _pass_seconds(read) for read in readers]


def _pass_seconds(read: Callable[[], object]) -> float:
    """Median seconds of one `read`; the GPU is busy while the first is launched, so that no launch counts."""
    times = []
    for _ in range(_PASSES + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        read()
        start.record()
        for _ in range(_READS):
            read()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _READS)
    return statistics.median(times[1:])


def gpu_result(
    engine: Engine,
    facts: GpuFacts,
    counters: Mapping[Strategy, FFNCounters],
    prefill: dict[str, PrefillWays],
    position: float,
    prompt: int,
) -> GpuResult:
    """What is to be said of the runs that `counters` and `prefill` are of, with `position` tokens in the KV cache on
    average, after `prompt` tokens."""
    runner, model, placement = gpu_runner(engine), engine.model, engine.placement
    assert runner is not None
    taken = None if facts.free_before is None else taken_bytes(runner.arena.device, facts.free_before)
    predicted = {name: predicted_seconds(engine, facts, name, position) for name in counters}
    made = placement.made_from
    return GpuResult(
        facts,
        planned=vram_plan(engine).total_bytes(placement.choice),
        used=runner.arena.used,
        taken=taken,
        steps={
            name: split_bytes(model, placement, name, total, facts.firing, position) for name, total in counters.items()
        },
        prefill=prefill,
        predicted={name: seconds for name, seconds in predicted.items() if seconds is not None},
        promised=made.get("predicted_tokens_per_second") if is_for_this_machine(engine, facts) else None,
        promised_for=made.get("strategy"),
        predicted_ttft=None if facts.hardware is None else runner.expected_seconds(prompt),
    )


def vram_plan(engine: Engine) -> VramPlan:
    """The plan of an engine's memory on the GPU, with its own predictors."""
    certified, proxied = (engine.plan.strategy == strategy for strategy in ("certified", "proxy"))
    sizes = _predictor_sizes(engine)
    return VramPlan(engine.model.spec, engine.context, sizes, certified=certified, proxied=proxied)


def _predictor_sizes(engine: Engine) -> tuple[int, ...]:
    spec = engine.model.spec
    ranks = [0 if ffn.predictor is None else len(ffn.predictor.b1) for ffn in engine.model.ffns]
    return tuple(predictor_bytes(spec.d_model, spec.d_ff, rank) for rank in ranks)


def is_for_this_machine(engine: Engine, facts: GpuFacts) -> bool:
    """Whether the placement was solved for the machine that it now runs on."""
    made = engine.placement.made_from
    known = facts.hardware is not None and made.get("hardware") == facts.hardware.name
    return known and "predicted_tokens_per_second" in made


def predicted_seconds(engine: Engine, facts: GpuFacts, strategy: Strategy, position: float) -> float | None:
    """The cost model's time per token with `position` tokens in the KV cache, where a placement assumes that it is
    full; None where the placement was not solved for this machine."""
    spec, frequency = engine.model.spec, facts.firing.frequency
    if facts.hardware is None or not is_for_this_machine(engine, facts):
        return None
    if frequency is None:
        frequency = np.ones((spec.n_layers, spec.d_ff))
    sizes = _predictor_sizes(engine) if strategy == "learned" else (0,) * spec.n_layers
    certified, proxied = strategy == "certified", strategy == "proxy"
    plan = VramPlan(spec, max(1, round(position)), sizes, certified=certified, proxied=proxied)
    hardware = facts.hardware.with_threads(engine.runtime.pool.threads)
    model = CostModel(
        plan, hardware, frequency, strategy, facts.firing.predicted_ratio, uncertain=facts.firing.uncertain
    )
    return model.evaluate(engine.placement.choice).seconds
