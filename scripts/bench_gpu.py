"""Everything that the GPU hybrid runtime must show, on one GPU: makes the models, checks, measures, reports.

    python scripts/bench_gpu.py --out RESULTS.jsonl [--stages handoff,tokens,budgets] [--minutes 9.5] [--keep]
    python scripts/bench_gpu.py --out RESULTS.jsonl --report

Every measurement is a process of its own and a line of RESULTS; one that is there already is not made again, so a run
goes on where an earlier one ended. One that fails prints a line, and the others go on. Models are made in a folder of
their own (45 GB with all stages) and removed at the end, without `--keep`. `bench_gpu_report.py` makes tables, a CSV
file and a plot of the lines. Exits with 2 where there is no GPU, with 1 when something failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from bench_gpu_report import read_results, write_report

from cpu_kernels.worker_pool import available_cpus
from hybrid.bench.measurements import origin
from hybrid.console import size
from placement.plan import UNLIMITED

SCRIPTS = Path(__file__).parent
GIB = 2**30
BUDGETS = (0, 2, 4, 8, 12, None)  # GiB; None is all that the card has
PREDICTED = (1, 3, 5, 6, 10, 14)  # beside those
THREADS = (1, 4, 8, 15)
CONTEXT, LONG_CONTEXT = 512, 2304
SHAPES = {
    "7b": "--d-model 4096 --d-ff 11008 --layers 32 --heads 32 --vocab 32000 --predictor-rank 1024 --context 4096",
    "13b": "--d-model 5120 --d-ff 13824 --layers 40 --heads 40 --vocab 32000 --predictor-rank 1024 --context 4096",
    "small": "--d-model 1024 --d-ff 4096 --layers 6 --heads 8 --vocab 8000 --predictor-rank 256 --context 512",
}


@dataclass(frozen=True)
class Run:
    """One measurement: what is run, in at most how many seconds, and which model it needs."""

    stage: str
    case: str
    command: tuple[str, ...]
    model: str | None = None
    limit: int = 240

    @classmethod
    def of(cls, stage: str, case: str, kind: str, model: str | None = None, limit: int = 240, **given: Any) -> Run:
        """A measurement of `bench_gpu_measure.py`; `{models}` in arguments stands for the models' folder."""
        if model is not None:
            given = {"model": f"{{models}}/{model}"} | given
        command = (sys.executable, str(SCRIPTS / "bench_gpu_measure.py"), kind, json.dumps(given))
        return cls(stage, case, command, model, limit)


def decode_run(stage: str, case: str, model: str, gib: float | None, **given: Any) -> Run:
    """A decode at a budget; slow budgets take fewer tokens."""
    slow = gib is not None and gib < 4
    amount = {"context": CONTEXT, "prompt": 64, "tokens": 48 if slow else 256, "runs": 2 if slow else 3}
    budget = UNLIMITED if gib is None else int(gib * GIB)
    return Run.of(stage, case, "decode", model, budget=budget, **(amount | given))


def all_runs() -> Iterator[Run]:
    """The measurements of every stage, in order."""
    yield Run.of("handoff", "mailbox", "handoff", threads=max(1, available_cpus() - 1), active=200)
    yield Run("kernels", "all", (sys.executable, str(SCRIPTS / "bench_gpu_kernels.py"), "--replays", "5"), limit=300)
    tokens = {"threads": THREADS, "prompt": 24, "tokens": 32}
    for model in (None, "shipped-int4"):
        name = "shipped model, " + ("int4" if model else "as it is")
        yield Run.of("tokens", name, "same_tokens", model, strategies=["dense", "exact"], **tokens)
    for model in ("small", "small-int4"):
        name = "synthetic model, " + ("int4" if "int4" in model else "bf16")
        yield Run.of("tokens", name, "same_tokens", model, strategies=["dense", "learned"], **tokens)
    for model in (None, "small"):
        name = "certified, " + ("synthetic model" if model else "shipped model")
        yield Run.of("certified", name, "same_tokens", model, strategies=["certified"], **tokens)
    for strategy in ("exact", "certified"):
        yield decode_run("certified", f"{strategy}, 8 GiB", "7b", 8, sparsity=strategy, tokens=64, runs=2, limit=400)
    for gib in BUDGETS:
        yield decode_run("budgets", "all" if gib is None else f"{gib} GiB", "7b", gib)
    yield decode_run("int4", "3 GiB", "7b-int4", 3, tokens=256, runs=3)
    yield decode_run("ablation", "dense, all on the GPU", "7b", None, sparsity="dense", tokens=128)
    sizes = ("--json", "--context", str(CONTEXT), "--prompt-tokens", "64", "--tokens", "64", "--runs", "2")
    command = (sys.executable, "-m", "hybrid", "bench", "{models}/7b", "--ablation", "--vram-budget", "8GiB", *sizes)
    yield Run("ablation", "hybrid bench --ablation", command, "7b", limit=360)
    for gib in BUDGETS:
        given = {"budget": UNLIMITED if gib is None else gib * GIB, "context": LONG_CONTEXT, "forced": gib == 8}
        case = "all" if gib is None else f"{gib} GiB"
        yield Run.of("prefill", case, "prefill", "7b", lengths=[64, 512, 2048], limit=300, **given)
    yield decode_run("latency", "2000 tokens", "7b", 8, context=LONG_CONTEXT, tokens=2000, runs=1)
    budgets = [gib * GIB for gib in PREDICTED]
    yield Run.of("predicted", "7b", "predict", "7b", budgets=budgets, context=CONTEXT, position=192)
    yield decode_run("13b", "10 GiB", "13b", 10)


STAGES = tuple(dict.fromkeys(run.stage for run in all_runs()))


class Failed(Exception):
    """A command that failed, in one line."""


@dataclass(frozen=True)
class Bench:
    """A results file, a folder of models, and when to stop (seconds of `time.monotonic`)."""

    out: Path
    models: Path
    end: float

    def run(self, stages: Sequence[str]) -> int:
        """Make what is not in the results yet; returns how many measurements failed or were left for lack of time."""
        done = {key for key, found in read_results(self.out).items() if "failed" not in found}
        missing = 0
        for run in (run for run in all_runs() if run.stage in stages and (run.stage, run.case) not in done):
            start = time.monotonic()
            try:
                if run.model is not None:
                    self.make(run.model)
                found = last_json(self.call(run.command, run.limit))
            except Failed as error:
                found, missing = {"failed": str(error)}, missing + 1
            self.record(run.stage, run.case, found | {"seconds": time.monotonic() - start})
        return missing

    def record(self, stage: str, case: str, found: Mapping[str, Any]) -> None:
        """Add a line to the results, and say so."""
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "case": case} | origin() | dict(found)) + "\n")
        text = f"failed: {found['failed']}" if "failed" in found else _short(found)
        click.echo(f"{stage}, {case}: {text} ({found['seconds']:.0f} s)")

    def call(self, command: Sequence[str], limit: float) -> str:
        """Standard output of a command. Raises `Failed` for a failure, or when it takes too long."""
        left = self.end - time.monotonic()
        if left < 5:
            raise Failed("no time is left")
        left = min(limit, left)
        arguments = [part.replace("{models}", str(self.models)) for part in command]
        path = os.pathsep.join(filter(None, (str(SCRIPTS.parent), os.environ.get("PYTHONPATH"))))
        try:
            ran = subprocess.run(
                arguments, capture_output=True, text=True, timeout=left, env=os.environ | {"PYTHONPATH": path}
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"took longer than {left:.0f} s") from None
        if ran.returncode:
            lines = (ran.stderr.strip() or ran.stdout.strip() or f"exit code {ran.returncode}").splitlines()
            raise Failed(lines[-1][:300])
        return ran.stdout

    def make(self, model: str) -> None:
        """A model with its artefacts and this machine's profile, where it is missing. Raises `Failed`."""
        folder, start = self.models / model, time.monotonic()
        if folder.exists():
            return
        self.models.mkdir(parents=True, exist_ok=True)
        if model == "shipped-int4":
            self.hybrid("pack", "--dtype", "int4", "-o", str(folder))
        elif model.endswith("-int4"):
            self.pack(self.models / model.removesuffix("-int4"), folder)
        else:
            shape = SHAPES[model].split()
            self.call(
                (sys.executable, str(SCRIPTS / "make_synthetic.py"), "--out", str(folder), "--device", "cuda", *shape),
                300,
            )
        if model != "shipped-int4":
            shutil.copyfile(self.hardware(), folder / "hybrid" / "hardware.json")
        click.echo(f"made {model} in {time.monotonic() - start:.0f} s")

    def pack(self, source: Path, folder: Path) -> None:
        """int4 by plain rounding, which the synthetic gates survive exactly: error feedback, which needs the profile,
        would take many minutes, and what is measured is speed."""
        self.make(source.name)
        plain = self.models / f"{source.name}-plain"
        shutil.copytree(source / "hybrid", plain, ignore=shutil.ignore_patterns("profile*"), dirs_exist_ok=True)
        self.hybrid("pack", str(source), "--dtype", "int4", "-o", str(folder), "--bundle", str(plain))
        shutil.rmtree(plain)
        shutil.copyfile(source / "hybrid" / "profile.safetensors", folder / "hybrid" / "profile.safetensors")

    def hardware(self) -> Path:
        """This machine's profile, measured once. Raises `Failed`."""
        path = self.models / "hardware.json"
        if not path.exists():
            start = time.monotonic()
            self.hybrid("hardware", "-o", str(path))
            found = json.loads(path.read_text(encoding="utf-8"))
            self.record("hardware", "profile", found | {"seconds": time.monotonic() - start})
        return path

    def hybrid(self, *arguments: str) -> None:
        self.call((sys.executable, "-m", "hybrid", *arguments), 300)


def remove_models(folder: Path) -> None:
    """Remove what this script made, and the folder where nothing else is in it."""
    for model in sorted({run.model for run in all_runs() if run.model is not None}):
        for path in (folder / model, folder / f"{model}-plain"):
            shutil.rmtree(path, ignore_errors=True)
    (folder / "hardware.json").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line, with what is above as `text`. Raises `Failed` where there is none."""
    *above, last = text.strip().splitlines() or [""]
    try:
        found = json.loads(last)
    except ValueError:
        raise Failed(f"expected a JSON object on the last line, got {last[:100]!r}") from None
    return found | ({"text": "\n".join(above)} if above else {})


def _short(found: Mapping[str, Any]) -> str:
    """The few numbers of a result that one wants to see go by."""
    parts = [
        f"{name} {found[name]:.4g}" for name in ("empty", "full", "speed", "share", "predicted") if found.get(name)
    ]
    parts += [f"{name} {found[name]}" for name in ("engines", "as_cpu", "as_dense", "differing") if name in found]
    if found.get("taken"):
        parts.append(f"planned {size(found['planned'])} taken {size(found['taken'])}")
    return ", ".join(parts) or "done"


def chosen_stages(text: str | None) -> list[str]:
    """Stages of a list such as `handoff,tokens`, all for None. Raises `BadParameter` for an unknown one."""
    stages = list(STAGES) if text is None else text.split(",")
    if unknown := sorted(set(stages) - set(STAGES)):
        raise click.BadParameter(f"unknown stage {', '.join(unknown)}; known are {', '.join(STAGES)}")
    return stages


@click.command(help="Make the models, check and measure the GPU hybrid runtime, and report.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Results, JSON lines.")
@click.option("--stages", metavar="LIST", help=f"Some of {','.join(STAGES)}  [default: all]")
@click.option("--models", type=click.Path(path_type=Path), default="/tmp/hybrid-models", show_default=True)
@click.option("--minutes", type=float, default=30.0, show_default=True, help="Begin and go on with nothing after that.")
@click.option("--keep", is_flag=True, help="Keep the models for another run.")
@click.option("--report", "reporting", is_flag=True, help="Only print the tables, and write the CSV file and the plot.")
@click.option("--results", type=click.Path(path_type=Path), default=SCRIPTS / "results", help="Folder of CSV and plot.")
def main(
    out: Path, stages: str | None, models: Path, minutes: float, keep: bool, reporting: bool, results: Path
) -> None:
    """Command line of this script."""
    chosen = chosen_stages(stages)
    missing = 0
    if not reporting:
        if not torch.cuda.is_available():
            click.echo("error: the hybrid runtime is measured on a CUDA GPU, and none was found", err=True)
            sys.exit(2)
        click.echo(f"{torch.cuda.get_device_name()}, {available_cpus()} CPUs")
        try:
            missing = Bench(out, models, time.monotonic() + 60 * minutes).run(chosen)
        finally:
            if not keep:
                remove_models(models)
    if not read_results(out):
        click.echo(f"error: {out} has no results; run without --report first", err=True)
        sys.exit(2)
    click.echo(write_report(out, results))
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
