"""What `hybrid bench` prints and stores: the ceiling first, then the speeds and their share of it, then the times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hybrid.bench.devices import GpuResult
from hybrid.bench.measurements import Spread
from hybrid.bench.peers import GreedyRun
from hybrid.bench.rows import RowsResult
from hybrid.console import counted, percent, table
from hybrid.model.ffn import FFNCounters

PEER = "llama.cpp"
_PHASES = {
    "predictor": "predictor_seconds",
    "attention": "attention_seconds",
    "FFN": "ffn_seconds",
    "head": "head_seconds",
}

# Which bytes are read in which phase.
_READ_IN = {
    "predictor": ("predictor",),
    "attention": ("attention", "keys and values"),
    "FFN": ("FFN",),
    "head": ("head",),
}


@dataclass
class BenchResult:
    """Runs of each strategy, in turn, bytes a token by part, and counters summed over them; bandwidths of host memory,
    bytes/s, and how many cores the process had while each was measured; gpu: what is to be said of a second device;
    rows: of steps of many rows, None where it is not known."""

    runs: dict[str, list[GreedyRun]]
    bytes: dict[str, dict[str, int]]
    counters: dict[str, FFNCounters] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    peer_runs: list[GreedyRun] = field(default_factory=list)
    gpu: GpuResult | None = None
    rows: RowsResult | None = None

    @property
    def bandwidth(self) -> float:
        return statistics.median(self.bandwidths)

    def least_seconds(self, name: str) -> float:
        """Of a token, at the bandwidths measured: the ceiling."""
        if self.gpu is not None:
            return self.gpu.steps[name].seconds(self.gpu.machine(self.bandwidth))
        return sum(self.bytes[name].values()) / self.bandwidth

    @property
    def summaries(self) -> dict[str, Summary]:
        """Of each strategy, and of the peer where one ran."""
        ours = {name: self._summary(name) for name in self.runs}
        return ours | ({PEER: Summary.of(self.peer_runs)} if self.peer_runs else {})

    def _summary(self, name: str) -> Summary:
        counters, runs = self.counters[name], self.runs[name]
        summary = Summary.of(runs)
        summary.bytes_per_token = sum(self.bytes[name].values())
        summary.share_of_ceiling = summary.speed.p50 * self.least_seconds(name)
        summary.active_share = counters.computed / counters.neurons if counters.neurons else None
        summary.agreement = agreement(runs[0], self.runs["dense"][0]) if "dense" in self.runs else None
        summary.milliseconds = milliseconds(runs, counters, as_one=self.gpu is not None)
        if self.gpu is not None:
            summary.hot_share = counters.fired_hot / counters.fired if counters.fired else None
            summary.predicted_over_measured = self._prediction(name, summary)
            if self.gpu.predicted_ttft is not None:
                summary.predicted_ttft_over_measured = 1e3 * self.gpu.predicted_ttft / summary.ttft
        if self.peer_runs:
            summary.over_peer = Ratio.of(runs, self.peer_runs)
        return summary

    def _prediction(self, name: str, summary: Summary) -> float | None:
        predicted = self.gpu.predicted.get(name) if self.gpu is not None else None
        return None if predicted is None else predicted * summary.speed.p50


@dataclass(frozen=True)
class Ratio:
    """Our speed over the peer's: of the medians, and the least and greatest of runs that followed each other."""

    of_medians: float
    least: float
    greatest: float

    @classmethod
    def of(cls, ours: Sequence[GreedyRun], theirs: Sequence[GreedyRun]) -> Ratio:
        speeds = [[run.tokens_per_second for run in side] for side in (ours, theirs)]
        pairs = [a / b for a, b in zip(*speeds, strict=True)]
        return cls(statistics.median(speeds[0]) / statistics.median(speeds[1]), min(pairs), max(pairs))


@dataclass
class Summary:
    """One strategy's numbers, or the peer's, for which what only the engine knows is None. Times are ms.

    prefill: tokens/s up to the first token. ttft: median. tpot: 50th, 90th and 99th percentile over all tokens.
    speed: decoded tokens/s per run. agreement: share of tokens that are dense's. hot_share: of the neurons computed,
    those on the GPU, where neurons were predicted. predicted_over_measured: time per token,
    predicted_ttft_over_measured: to the first one.
    """

    runs: int
    prefill: float
    ttft: float
    tpot: tuple[float, float, float]
    speed: Spread
    bytes_per_token: int | None = None
    share_of_ceiling: float | None = None
    active_share: float | None = None
    agreement: float | None = None
    milliseconds: dict[str, float | None] | None = None
    over_peer: Ratio | None = None
    hot_share: float | None = None
    predicted_over_measured: float | None = None
    predicted_ttft_over_measured: float | None = None

    @classmethod
    def of(cls, runs: Sequence[GreedyRun]) -> Summary:
        ttft = statistics.median(run.ttft for run in runs)
        intervals = [interval for run in runs for interval in run.intervals]
        p50, p90, p99 = (1e3 * float(value) for value in np.percentile(intervals, (50, 90, 99)))
        speed = Spread.of([run.tokens_per_second for run in runs])
        return cls(len(runs), runs[0].prompt_tokens / ttft, 1e3 * ttft, (p50, p90, p99), speed)


def agreement(run: GreedyRun, truth: GreedyRun) -> float:
    """Share of places where both have the same token."""
    return float(np.mean(np.array(run.tokens) == np.array(truth.tokens)))


def milliseconds(runs: Sequence[GreedyRun], counters: FFNCounters, as_one: bool = False) -> dict[str, float | None]:
    """Where a token's time went, ms; `rest` is what no phase counted: sampling, text, the loop itself.

    as_one: the phases of a step on two devices are one graph, and only all of it is timed, as `step`.
    """
    count = sum(len(run.intervals) for run in runs)
    total = 1e3 * sum(sum(run.intervals) for run in runs) / count
    if as_one:
        step = 1e3 * counters.ffn_seconds / count
        return dict.fromkeys(_PHASES) | {"step": step, "rest": total - step}
    phases = {name: 1e3 * getattr(counters, attribute) / count for name, attribute in _PHASES.items()}
    return {**phases, "rest": total - sum(phases.values())}


def report(result: BenchResult, setting: Mapping[str, Any], same_text: bool) -> str:
    """All that is printed but the JSON line. same_text: whether the peer computes what dense does."""
    parts = [_head_lines(result, setting), _ceiling_table(result), _speed_table(result), _time_table(result)]
    if result.gpu is not None:
        parts.append(result.gpu.memory())
    if result.rows is not None:
        parts.append(result.rows.text())
    if result.peer_runs:
        parts.append(_peer_lines(result, same_text))
    return "\n\n".join(parts)


def _head_lines(result: BenchResult, setting: Mapping[str, Any]) -> str:
    measured, gpu = [bandwidth / 1e9 for bandwidth in result.bandwidths], result.gpu
    lines = [
        f"{setting['model']}, {setting['dtype']}, {counted(setting['threads'], 'thread')} of {setting['machine']}",
        f"read bandwidth {result.bandwidth / 1e9:.1f} GB/s (median of {min(measured):.1f} to {max(measured):.1f}), "
        f"measured with {min(result.cores):.1f} to {max(result.cores):.1f} cores",
    ]
    if gpu is not None:
        lines.append(
            f"{gpu.facts.name}: read bandwidth {gpu.facts.read_bandwidth / 1e9:,.0f} GB/s, "
            f"a hand-off takes {1e6 * gpu.facts.handoff_seconds:.1f} us"
        )
    return "\n".join(lines)


def _ceiling_table(result: BenchResult) -> str:
    parts = list(next(iter(result.bytes.values())))
    rows: list[list[object]] = [[part, *(f"{b[part] / 1e6:,.1f}" for b in result.bytes.values())] for part in parts]
    rows.append(["all", *(f"{sum(b.values()) / 1e6:,.1f}" for b in result.bytes.values())])
    if result.gpu is not None:
        steps = [result.gpu.steps[name] for name in result.bytes]
        rows.append(["hand-offs", *(step.handoffs for step in steps)])
    least = [result.least_seconds(name) for name in result.bytes]
    if result.gpu is not None:
        rows.append(["least ms", *(f"{1e3 * seconds:.3f}" for seconds in least)])
    rows.append(["ceiling, tok/s", *(f"{1 / seconds:,.1f}" for seconds in least)])
    return table(["MB per token", *result.bytes], rows)


def _speed_table(result: BenchResult) -> str:
    found = result.summaries
    lines: dict[str, list[object]] = {
        "tok/s, median": [f"{s.speed.p50:.1f}" for s in found.values()],
        "  p20 to p80": [f"{s.speed.p20:.1f} to {s.speed.p80:.1f}" for s in found.values()],
        "share of ceiling": [percent(s.share_of_ceiling) for s in found.values()],
        "TPOT p50, ms": [f"{s.tpot[0]:.2f}" for s in found.values()],
        "TPOT p90, ms": [f"{s.tpot[1]:.2f}" for s in found.values()],
        "TPOT p99, ms": [f"{s.tpot[2]:.2f}" for s in found.values()],
        "TTFT, ms": [f"{s.ttft:.1f}" for s in found.values()],
        "prefill, tok/s": [f"{s.prefill:,.0f}" for s in found.values()],
        "neurons computed": [percent(s.active_share) for s in found.values()],
        "tokens as dense": [percent(s.agreement) for s in found.values()],
    }
    if result.gpu is not None:
        lines |= _gpu_lines(result.gpu, found)
    runs = len(next(iter(result.runs.values())))
    return table([f"{runs} runs", *found], [[name, *cells] for name, cells in lines.items()])


def _gpu_lines(gpu: GpuResult, found: Mapping[str, Summary]) -> dict[str, list[object]]:
    """Lines of the table of speeds that only two devices have."""
    predicted = [gpu.predicted.get(name) for name in found]
    promised = [gpu.promised if name == gpu.promised_for else None for name in found]
    off = [s.predicted_over_measured for s in found.values()]
    ways = [gpu.prefill.get(name) for name in found]
    firsts_off = [s.predicted_ttft_over_measured for s in found.values()]
    firsts = [None if ratio is None else gpu.predicted_ttft for ratio in firsts_off]
    return {
        "computed by the GPU": [percent(s.hot_share) for s in found.values()],
        "predicted, ms": ["-" if seconds is None else f"{1e3 * seconds:.2f}" for seconds in predicted],
        "  over measured": ["-" if ratio is None else f"{ratio - 1:+.1%}" for ratio in off],
        "  at a full context, tok/s": ["-" if speed is None else f"{speed:.1f}" for speed in promised],
        "TTFT predicted, ms": ["-" if seconds is None else f"{1e3 * seconds:.1f}" for seconds in firsts],
        "  over measured, first token": ["-" if ratio is None else f"{ratio - 1:+.1%}" for ratio in firsts_off],
        "prefill, layers streamed": ["-" if way is None else way.streamed for way in ways],
        "  cold ones by the CPU": ["-" if way is None else way.computed for way in ways],
        "  whole ones by the CPU": ["-" if way is None else way.on_cpu for way in ways],
    }


def _time_table(result: BenchResult) -> str:
    times = {name: s.milliseconds for name, s in result.summaries.items() if s.milliseconds is not None}
    rows: list[list[object]] = []
    for phase in next(iter(times.values())):
        cells = ["-" if (ms := each[phase]) is None else f"{ms:.3f}" for each in times.values()]
        speeds = [_gigabytes(result.bytes[name], each[phase], phase) for name, each in times.items()]
        rows.append([phase, *(cell for pair in zip(cells, speeds, strict=True) for cell in pair)])
    header = [cell for name in times for cell in (name, "GB/s")]
    return table(["ms per token", *header], rows)


def _gigabytes(parts: Mapping[str, int], milliseconds: float | None, phase: str) -> str:
    """How fast a phase read its bytes."""
    read = sum(parts.values()) if phase == "step" else sum(parts.get(part, 0) for part in _READ_IN.get(phase, ()))
    return f"{read / milliseconds / 1e6:.1f}" if read and milliseconds else "-"


def _peer_lines(result: BenchResult, same_text: bool) -> str:
    lines = []
    for name, summary in result.summaries.items():
        if (ratio := summary.over_peer) is not None:
            lines.append(
                f"{name} over {PEER}: {ratio.of_medians:.2f} (medians; pairs {ratio.least:.2f} to {ratio.greatest:.2f})"
            )
    if same_text and "dense" in result.runs:
        same = agreement(result.peer_runs[0], result.runs["dense"][0])
        lines.append(f"{percent(same)} of {PEER}'s tokens are those of dense")
    elif not same_text:
        lines.append(f"{PEER} computes silu in place of this model's activation: same shape and work, other text")
    return "\n".join(lines)


def csv_rows(result: BenchResult, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per strategy, and one for the peer. Rows of two devices have more columns, and so files of their own."""
    return [
        {
            **setting,
            "strategy": name,
            "runs": s.runs,
            "tokens_per_second_p20": s.speed.p20,
            "tokens_per_second_p50": s.speed.p50,
            "tokens_per_second_p80": s.speed.p80,
            "read_bandwidth": result.bandwidth,
            "bytes_per_token": s.bytes_per_token,
            "share_of_ceiling": s.share_of_ceiling,
            "active_share": s.active_share,
            "agreement": s.agreement,
            "prefill_tokens_per_second": s.prefill,
            "ttft_ms": s.ttft,
            "tpot_ms_p50": s.tpot[0],
            "tpot_ms_p99": s.tpot[2],
            "over_peer": s.over_peer.of_medians if s.over_peer else None,
            **(_gpu_columns(result.gpu, name, s) if result.gpu else {}),
        }
        for name, s in result.summaries.items()
    ]


def _gpu_columns(gpu: GpuResult, name: str, summary: Summary) -> dict[str, Any]:
    return gpu.columns(name) | {
        "hot_share": summary.hot_share,
        "predicted_over_measured": summary.predicted_over_measured,
        "predicted_ttft_over_measured": summary.predicted_ttft_over_measured,
        "tpot_ms_p90": summary.tpot[1],
    }


def json_line(result: BenchResult, setting: Mapping[str, Any]) -> str:
    """Everything measured, on one line."""
    found = {name: asdict(summary) | {"bytes": result.bytes.get(name)} for name, summary in result.summaries.items()}
    more = {name: part.as_json() for name, part in (("gpu", result.gpu), ("rows", result.rows)) if part is not None}
    line = {**setting, "read_bandwidth": result.bandwidth, "cores": result.cores, **more, "results": found}
    return json.dumps(line)
