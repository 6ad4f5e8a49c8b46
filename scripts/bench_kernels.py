"""Time every CPU kernel against the machine's read bandwidth, torch and the NumPy reference.

    python scripts/bench_kernels.py [--only gemv] [--threads 1,2] [--passes 9] [--quick] [--csv FILE]

The bandwidth is measured before every pass of every kernel and a kernel's share is that of the medians, so a machine
that slows down slows both. The last line is one JSON object. With several counts of threads the strong scaling follows
as a table. Speeds include the launcher: Python, waking the workers and joining them; see `calls`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from kernel_cases import Case, Sizes, all_cases

from cpu_kernels.bandwidth import BandwidthProbe
from cpu_kernels.worker_pool import WorkerPool, available_cpus
from hybrid.bench.measurements import Spread, append_csv, origin
from hybrid.console import percent, progress, table
from hybrid.errors import HybridError, InputError

_REFERENCE_PASSES = 3  # it is there for the size of the gap only


@dataclass(frozen=True)
class Timing:
    """A kernel on some threads. gigabytes: GB/s of a pass; cores: the least that this process had during the probes;
    share: of the read bandwidth, where the bytes come from memory; over_torch, over_reference: speed over theirs."""

    case: str
    threads: int
    calls: int
    megabytes: float
    microseconds_per_call: float
    gigabytes: Spread
    read_bandwidth: float
    cores: float
    share: float | None
    over_torch: float | None
    over_reference: float


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_case(case: Case, pool: WorkerPool, probe: BandwidthProbe, passes: int) -> Timing:
    """Probe, kernel and torch in turn, `passes` times, after one of each that is not counted."""
    torch.set_num_threads(pool.threads)
    bandwidths, cores, ours, theirs = list[float](), list[float](), list[float](), list[float]()
    for number in range(passes + 1):
        bandwidth, own = probe.measure(0.0), seconds(lambda: case.run(pool))
        other = seconds(case.torch) if case.torch else None
        if number:
            bandwidths.append(bandwidth)
            cores.append(probe.cores)
            ours.append(own)
            theirs += [other] if other else []
    median, bandwidth = statistics.median(ours), statistics.median(bandwidths)
    speed = case.nbytes / median
    reference = statistics.median(seconds(case.reference) for _ in range(_REFERENCE_PASSES))
    return Timing(
        case.name,
        pool.threads,
        case.calls,
        case.nbytes / 1e6,
        1e6 * median / case.calls,
        Spread.of([case.nbytes / each / 1e9 for each in ours]),
        bandwidth / 1e9,
        min(cores),
        speed / bandwidth if case.from_memory else None,
        statistics.median(theirs) / median if theirs else None,
        speed / (case.reference_bytes / reference),
    )


def kernel_table(timings: Sequence[Timing]) -> str:
    """One row per kernel."""
    header = [
        "kernel",
        "MB",
        "calls",
        "us a call",
        "GB/s",
        "p20",
        "p80",
        "read GB/s",
        "cores",
        "share",
        "x torch",
        "x NumPy",
    ]
    rows = [
        [
            t.case,
            f"{t.megabytes:,.1f}",
            t.calls,
            f"{t.microseconds_per_call:,.1f}",
            *(
                f"{value:.1f}"
                for value in (t.gigabytes.p50, t.gigabytes.p20, t.gigabytes.p80, t.read_bandwidth, t.cores)
            ),
            percent(t.share),
            "-" if t.over_torch is None else f"{t.over_torch:.1f}",
            f"{t.over_reference:,.0f}",
        ]
        for t in timings
    ]
    return table(header, rows)


def scaling_table(timings: Sequence[Timing], threads: Sequence[int]) -> str:
    """GB/s of each kernel, and of the probe, by the number of threads."""
    speeds = {(t.case, t.threads): t.gigabytes.p50 for t in timings}
    names = list(dict.fromkeys(t.case for t in timings if t.share is not None))
    rows = [[name, *(f"{speeds[name, count]:.1f}" for count in threads)] for name in names]
    read = [statistics.median(t.read_bandwidth for t in timings if t.threads == count) for count in threads]
    return table(["GB/s, threads", *threads], [["read bandwidth", *(f"{each:.1f}" for each in read)], *rows])


def thread_counts(text: str | None) -> list[int]:
    """`1,2,4` as numbers. Raises `InputError`."""
    try:
        counts = sorted({int(part) for part in text.split(",")}) if text else [available_cpus()]
    except ValueError as error:
        raise InputError(f"--threads is {text!r}, expected numbers such as 1,2,4") from error
    if counts[0] < 1 or counts[-1] > available_cpus():
        raise InputError(f"--threads is {text!r}, expected 1 to {available_cpus()}, as many as this process may use")
    return counts


def run_all(only: str, threads: Sequence[int], passes: int, quick: bool, size: int) -> list[Timing]:
    """Time the cases whose name contains `only`, one after another, each with every count of threads."""
    sizes = Sizes(total=size, workers=threads[-1])
    chosen = [(name, make) for name, make in all_cases(quick, sizes) if only in name]
    if not chosen:
        known = sorted({name.split()[0] for name, _ in all_cases(quick, sizes)})
        raise InputError(f"no kernel's name contains {only!r}; they begin with: {', '.join(known)}")
    pools = [WorkerPool(count) for count in threads]
    probes = [BandwidthProbe(pool, size) for pool in pools]
    click.echo(
        "read bandwidth, GB/s: "
        + ", ".join(
            f"{probe.measure() / 1e9:.1f} ({pool.threads} threads)" for pool, probe in zip(pools, probes, strict=True)
        )
    )
    timings = []
    with progress("kernels", len(chosen), "case") as advance:
        for _, make in chosen:
            case = make()
            timings += [time_case(case, pool, probe, passes) for pool, probe in zip(pools, probes, strict=True)]
            advance(1)
    for pool in pools:
        pool.close()
    return timings


@click.command(help="Time every CPU kernel against the read bandwidth, torch and the NumPy reference.")
@click.option("--only", default="", help="Kernels whose name contains this, such as 'gemv bf16'.")
@click.option("--threads", "threads_text", metavar="LIST", help="Such as 1,2,4  [default: all]")
@click.option("--passes", type=click.IntRange(5), default=9, show_default=True)
@click.option("--quick", is_flag=True, help="64 MiB of weights, one width, three types.")
@click.option("--megabytes", type=click.IntRange(1), help="MiB of weights of a case  [default: 512, quick 64]")
@click.option("--csv", type=click.Path(path_type=Path), help="Also add a row per kernel to this file.")
def main(
    only: str, threads_text: str | None, passes: int, quick: bool, megabytes: int | None, csv: Path | None
) -> None:
    """Command line of this script."""
    try:
        threads = thread_counts(threads_text)
        timings = run_all(only, threads, passes, quick, 2**20 * (megabytes or (64 if quick else 512)))
        click.echo("\n" + kernel_table([t for t in timings if t.threads == threads[-1]]))
        if len(threads) > 1:
            click.echo("\n" + scaling_table(timings, threads))
        setting = origin()
        rows = [asdict(t) | {f"gigabytes_{k}": v for k, v in asdict(t.gigabytes).items()} for t in timings]
        if csv:
            append_csv(csv, [setting | {k: v for k, v in row.items() if k != "gigabytes"} for row in rows])
        click.echo(json.dumps(setting | {"kernels": [asdict(t) for t in timings]}))
    except HybridError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
