"""Time every GPU kernel in a CUDA graph against the GPU's read bandwidth, torch, and its reference.

    python scripts/bench_gpu_kernels.py [--only gemv] [--replays 15] [--tune] [--kinds bf16,int4]

Weights are copied often enough that the L2 cache does not hold them. The read bandwidth is that of a torch sum over
2 GiB, before and after. A row is printed as soon as it is there; the last line is one JSON object. `--tune` times GEMV,
the sparse FFN and the predictor over rows of a program, groups of a thread and warps, and prints the fastest; kernels
are compiled beforehand by several processes. Exits with 2 where there is no GPU, with 1 when an answer is wrong or a
kernel fails.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import click
import torch
from gpu_kernel_cases import (
    FF,
    GEMV_SHAPES,
    Case,
    D,
    all_cases,
    gemv_case,
    predict_case,
    random_matrix,
    random_values,
    sparse_ffn_case,
)
from triton.errors import TritonError

from gpu_kernels.gemv import Tiling, gemv
from gpu_kernels.low_rank import TILING as PREDICTOR
from gpu_kernels.low_rank import PredictorTiling
from gpu_kernels.matrix import KINDS
from gpu_kernels.sparse_ffn import TILINGS, DeviceFFNView, FFNTiling, down_parts, sparse_ffn
from hybrid.bench.measurements import origin
from hybrid.console import percent

WRONG = 1e-4  # relative error from which an answer is wrong
PROBE_BYTES = 2 * 2**30
CALLS = 32  # at least so many calls in a graph
AnyTiling = Tiling | FFNTiling | PredictorTiling


@dataclass(frozen=True)
class Timing:
    """A kernel: a call's time inside a graph, GB/s, the share of the read bandwidth, torch's time over ours."""

    case: str
    megabytes: float
    microseconds: float
    gigabytes: float
    share: float | None
    over_torch: float | None
    error: float

    @property
    def line(self) -> str:
        torch_ratio = "-" if self.over_torch is None else f"{self.over_torch:.2f}"
        numbers = f"{self.megabytes:9.2f} {self.microseconds:9.2f} {self.gigabytes:8.0f} {percent(self.share):>7}"
        return f"{self.case:44} {numbers} {torch_ratio:>8} {self.error:9.1e}" + ("  WRONG" if self.wrong else "")

    @property
    def wrong(self) -> bool:
        return not self.error < WRONG


HEADER = f"{'kernel':44} {'MB':>9} {'us':>9} {'GB/s':>8} {'share':>7} {'x torch':>8} {'error':>9}"


def microseconds(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Median time of one call of a captured sequence of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    repeats = -(-CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.chain(*[calls] * repeats):
            call()
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (repeats * len(calls)))
    return statistics.median(times[2:])


def read_bandwidth(replays: int) -> float:
    """GB/s of a torch sum over much more than the L2."""
    buffer = torch.ones(PROBE_BYTES // 4, device="cuda")
    return PROBE_BYTES / 1e3 / microseconds([buffer.sum], replays)


def time_case(case: Case, bandwidth: float, replays: int) -> Timing:
    error = case.error()
    ours = microseconds(case.calls, replays)
    theirs = microseconds(case.torch, replays) if case.torch else None
    speed = case.nbytes / 1e3 / ours
    share = speed / bandwidth if case.streams else None
    return Timing(case.name, case.nbytes / 1e6, ours, speed, share, theirs / ours if theirs else None, error)


def time_all(only: str, bandwidth: float, replays: int) -> tuple[list[Timing], dict[str, str]]:
    """Timings of the cases whose name contains `only`, and the messages of those that failed."""
    click.echo(HEADER)
    timings, failures = [], {}
    for name, make in all_cases().items():
        if only not in name:
            continue
        try:
            timings.append(time_case(make(), bandwidth, replays))
            click.echo(timings[-1].line)
        except (RuntimeError, ValueError, TritonError) as error:
            failures[name] = str(error).strip().splitlines()[-1][:300]
            click.echo(f"{name:44} failed: {failures[name]}")
        torch.cuda.empty_cache()
    return timings, failures


def gemv_tilings() -> Iterator[Tiling]:
    for rows, groups, warps in itertools.product((1, 2, 4, 8), (1, 2, 4), (2, 4, 8)):
        if rows * groups <= 16:
            yield Tiling(rows, groups, warps)


def ffn_tilings(kind: str) -> Iterator[FFNTiling]:
    """Other ways to read gate and up, then other ways to read down."""
    chosen = TILINGS[kind]
    for rows, groups, warps in itertools.product((1, 2, 4), (1, 2, 4), (2, 4, 8)):
        if rows * groups <= 8:
            yield replace(chosen, first=Tiling(rows, groups, warps))
    for depth, columns, warps in itertools.product((4, 8, 16), (128, 256, 512), (2, 4, 8)):
        if kind != "int4" or depth < 16:
            yield replace(chosen, depth=depth, columns=columns, warps=warps)


def predictor_tilings() -> Iterator[PredictorTiling]:
    """Other ways to read fc1, then other ways to read fc2."""
    for rows, groups, warps in itertools.product((1, 2, 4), (1, 2), (2, 4, 8)):
        yield replace(PREDICTOR, hidden=Tiling(rows, groups, warps))
    for rows, groups, warps in itertools.product((2, 4, 8, 16), (1, 2), (1, 2)):
        yield replace(PREDICTOR, firing=Tiling(rows, groups, warps))


def compile_one(kind: str, tiling: AnyTiling) -> None:
    """Run a kernel on a few rows, which leaves it in Triton's cache on disk."""
    one, x = random_matrix(kind, 64, D), random_values(1, D)
    try:
        if isinstance(tiling, PredictorTiling):
            predict_case(tiling=tiling).calls[0]()
        elif isinstance(tiling, Tiling):
            gemv(one, x, None, random_values(1, 64), tiling=tiling)
        else:
            ids, count = (
                torch.zeros(64, dtype=torch.int32, device="cuda"),
                torch.ones(1, dtype=torch.int32, device="cuda"),
            )
            view = DeviceFFNView(one, one, one, random_values(64), None, "relu")
            out = random_values(down_parts(D), 1, D)
            sparse_ffn(view, x, ids, count, None, random_values(1, 64), out, tiling=tiling)
        torch.cuda.synchronize()
    except (RuntimeError, TritonError):
        return  # it will fail again, and be reported, where it is timed


def compile_all(jobs: Sequence[tuple[str, AnyTiling]]) -> None:
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 1))
    click.echo(f"compiling {len(jobs)} kernels in {workers} processes", err=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4))


def tune_one(
    label: str, make: Callable[..., Case], tilings: Sequence[AnyTiling], bandwidth: float
) -> dict[str, object]:
    """Print and return the fastest tilings of one case that give the right answer."""
    found = []
    for tiling in tilings:
        try:
            timing = time_case(replace(make(tiling=tiling), torch=[]), bandwidth, 5)
        except (RuntimeError, ValueError, TritonError) as error:
            click.echo(f"{label} {tiling} failed: {str(error).strip().splitlines()[-1][:200]}")
            continue
        if timing.wrong:
            click.echo(f"{label} {tiling} WRONG: {timing.error:.1e}")
        else:
            found.append((timing.microseconds, tiling, timing))
    found.sort(key=lambda each: each[0])
    click.echo(f"{label}: {found[0][2].case}" if found else f"{label}: none ran")
    for time, tiling, timing in found[:6]:
        click.echo(f"  {time:8.2f} us {percent(timing.share):>7}  {tiling}")
    return {"case": label, "fastest": [(round(time, 3), asdict(tiling)) for time, tiling, _ in found[:6]]}


def searches(kinds: Sequence[str]) -> Iterator[tuple[str, str, Callable[..., Case], list[AnyTiling]]]:
    """Name, kind of weights, maker of the case and tilings: the predictor, and of each kind GEMV and the sparse FFN."""
    yield "predict", "int8", predict_case, list(predictor_tilings())
    for kind in kinds:
        for name, (n, d) in GEMV_SHAPES.items():
            yield f"gemv {kind} {name}", kind, partial(gemv_case, kind, name, n, d), list(gemv_tilings())
        for hot, active in ((4000, 640), (FF, 1100)):
            make = partial(sparse_ffn_case, kind, hot, active)
            yield f"sparse_ffn {kind} {active} of {hot}", kind, make, list(ffn_tilings(kind))


def tune(kinds: Sequence[str], only: str, bandwidth: float) -> list[dict[str, object]]:
    """Results of the searches whose name contains `only`."""
    chosen = [search for search in searches(kinds) if only in search[0]]
    compile_all(list(dict.fromkeys((kind, tiling) for _, kind, _, tilings in chosen for tiling in tilings)))
    results = []
    for label, _, make, tilings in chosen:
        results.append(tune_one(label, make, tilings, bandwidth))
        torch.cuda.empty_cache()
    return results


@click.command(help="Time every GPU kernel against the read bandwidth, torch and its reference.")
@click.option("--only", default="", help="Kernels whose name contains this, such as 'gemv bf16'.")
@click.option("--replays", type=click.IntRange(3), default=15, show_default=True)
@click.option("--tune", "tuning", is_flag=True, help="Try tilings of GEMV, the sparse FFN and the predictor.")
@click.option("--kinds", default="bf16,int8,int4", show_default=True, help="Kinds of weights that --tune tries.")
def main(only: str, replays: int, tuning: bool, kinds: str) -> None:
    """Command line of this script."""
    unknown = set(kinds.split(",")) - set(KINDS)
    if not torch.cuda.is_available() or unknown:
        reason = (
            f"unknown kinds: {', '.join(sorted(unknown))}"
            if unknown
            else "GPU kernels are timed on a CUDA GPU, and none was found"
        )
        click.echo(f"error: {reason}", err=True)
        sys.exit(2)
    torch.manual_seed(0)
    before = read_bandwidth(replays)
    click.echo(f"{torch.cuda.get_device_name()}: a torch sum reads {before:,.0f} GB/s")
    result: dict[str, object] = origin() | {"gpu": torch.cuda.get_device_name(), "read_bandwidth": before}
    failed = False
    if tuning:
        result["tilings"] = tune(kinds.split(","), only, before)
    else:
        timings, failures = time_all(only, before, replays)
        failed = bool(failures) or any(timing.wrong for timing in timings)
        result |= {"kernels": [asdict(timing) for timing in timings], "failures": failures}
    result["read_bandwidth_after"] = read_bandwidth(replays)
    click.echo(f"a torch sum reads {result['read_bandwidth_after']:,.0f} GB/s afterwards")
    click.echo(json.dumps(result))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
