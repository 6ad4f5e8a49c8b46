"""Measure `AsyncEngine`: tokens/s by how many answer at once, and what callers meet under load.

    python scripts/bench_serving.py batches [--sequences 1,2,4,8,16,32] [--tokens 64]
    python scripts/bench_serving.py load [--share 0.8] [--seconds 600] [--tokens 64]
    python scripts/bench_serving.py prefix [--tokens 1000]

`batches`: so many answers begin together; tokens/s of all of them from the last one's first token on, best of three.
`load`: capacity is what as many callers as may run get who ask again at once; then requests arrive by chance (Poisson)
at a share of it. For each, the time to its first token (TTFT), mean time per token after it (TPOT) and its longest gap
between two tokens; goodput is the share that met both limits. The longest pause is that of these requests, beside that
of the capacity's; what a virtual machine's host took of its CPUs meanwhile, and the most within a quarter of a second,
stands there too. `prefix`: TTFT of a long prompt, of the same chat's next turn, and of the prompt asked again. The last
line is JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np

from hybrid import AsyncEngine, EngineConfig, Request, SamplingSettings, ServingConfig
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.serving.request import QueueFullError

TTFT_LIMIT, TPOT_LIMIT = 2.0, 0.1  # seconds, of goodput
_PERCENTILES = (50, 90, 99)


@dataclass
class Met:
    """What one caller met: seconds since its request at each of its tokens; `failed`: in place of an end."""

    times: list[float] = field(default_factory=list)
    failed: str | None = None

    @property
    def ttft(self) -> float:
        return self.times[0]

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)

    @property
    def longest_gap(self) -> float:
        return float(np.diff(self.times).max(initial=0.0))


def requests(vocab: int, shortest: int, longest: int, tokens: int, seed: int) -> Iterator[Request]:
    """Prompts of random tokens, their lengths spread evenly over orders of magnitude."""
    rng = np.random.default_rng(seed)
    settings = SamplingSettings(temperature=0, max_new_tokens=tokens)
    while True:
        length = round(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
        yield Request(tuple(rng.integers(6, vocab, length).tolist()), settings)


async def arrivals(rate: float, seconds: float, seed: int) -> AsyncIterator[None]:
    """Comes by at random, `rate` times a second on the mean, for so many seconds."""
    rng, start, due = np.random.default_rng(seed), perf_counter(), 0.0
    while (due := due + rng.exponential(1 / rate)) < seconds:
        await asyncio.sleep(max(0.0, start + due - perf_counter()))
        yield


async def ask(engine: AsyncEngine, request: Request) -> Met:
    """One caller, from its request to the last token."""
    met, start = Met(), perf_counter()
    try:
        async for _ in engine.generate(request):
            met.times.append(perf_counter() - start)
    except QueueFullError as error:
        met.failed = str(error)
    return met


async def capacity(engine: AsyncEngine, asked: Iterator[Request], seconds: float) -> float:
    """Requests a second where somebody always waits."""
    end, done = perf_counter() + seconds, 0

    async def caller() -> None:
        nonlocal done
        while perf_counter() < end:
            await ask(engine, next(asked))
            done += 1

    start = perf_counter()
    await asyncio.gather(*(caller() for _ in range(engine.serving.max_running)))
    return done / (perf_counter() - start)


def summary(found: Sequence[Met]) -> dict[str, Any]:
    """Percentiles in ms over those that were answered, and how many were not."""
    answered = [met for met in found if met.failed is None and met.times]
    rows: dict[str, Any] = {"requests": len(found), "failed": len(found) - len(answered)}
    for name in ("ttft", "tpot", "longest_gap"):
        values = [1000 * getattr(met, name) for met in answered] or [float("nan")]
        rows |= {f"{name}_p{p}_ms": round(float(np.percentile(values, p)), 2) for p in _PERCENTILES}
    rows["longest_gap_ms"] = round(1000 * max((met.longest_gap for met in answered), default=float("nan")), 2)
    good = sum(met.ttft <= TTFT_LIMIT and met.tpot <= TPOT_LIMIT for met in answered)
    return rows | {"goodput": round(good / max(1, len(found)), 4)}


def resident_bytes() -> int:
    """Memory of this process, 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def stolen_seconds() -> float:
    """What a virtual machine's host has taken of each CPU so far, on the mean; 0 where the system does not say."""
    status = Path("/proc/stat")
    first = status.read_text(encoding="ascii").split("\n", 1)[0].split() if status.is_file() else []
    return int(first[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1) if len(first) > 8 else 0.0


async def watch_stolen(longest: list[float]) -> None:
    """Keep the most that was taken within some quarter of a second in `longest`, until it is cancelled."""
    seen = deque([stolen_seconds()], maxlen=26)
    while True:
        await asyncio.sleep(0.01)
        seen.append(stolen_seconds())
        longest[0] = max(longest[0], seen[-1] - seen[0])


async def load(engine: AsyncEngine, share: float, seconds: float, tokens: int, seed: int) -> dict[str, Any]:
    """Capacity, then requests at a share of it for so many seconds."""
    longest = min(1500, engine.context - tokens - 1)
    asked = requests(engine.plan.spec.vocab_size, 16, longest, tokens, seed)
    most = await capacity(engine, asked, max(2.0, seconds / 10))
    before_load = engine.figures()
    engine.restart_longest_pause()
    before, tasks, stolen, longest_stolen = resident_bytes(), [], stolen_seconds(), [0.0]
    watch, start = asyncio.create_task(watch_stolen(longest_stolen)), perf_counter()
    async for _ in arrivals(share * most, seconds, seed):
        tasks.append(asyncio.create_task(ask(engine, next(asked))))
    found = summary(await asyncio.gather(*tasks))
    figures = engine.figures()
    watch.cancel()
    return {
        "capacity_per_second": round(most, 3),
        "share": share,
        **found,
        "grown_mib": round((resident_bytes() - before) / 2**20, 1),
        "longest_pause_ms": round(1000 * figures.longest_pause_seconds, 2),
        "longest_pause_of_capacity_ms": round(1000 * before_load.longest_pause_seconds, 2),
        "stolen_share": round((stolen_seconds() - stolen) / (perf_counter() - start), 4),
        "stolen_longest_ms": round(1000 * longest_stolen[0], 1),
        "preempted": figures.preempted_total - before_load.preempted_total,
        "kv_blocks_used": figures.kv_blocks_used,
    }


async def batch(engine: AsyncEngine, sequences: int, tokens: int) -> float:
    """Tokens a second of so many answers that begin together."""
    asked = requests(engine.plan.spec.vocab_size, 8, 8, tokens, sequences)
    start = perf_counter()

    async def one() -> list[float]:
        began = perf_counter() - start
        met = await ask(engine, next(asked))
        return [began + time for time in met.times]

    times = await asyncio.gather(*(one() for _ in range(sequences)))
    begin, end = max(row[0] for row in times), max(row[-1] for row in times)
    return sum(begin < time for row in times for time in row) / (end - begin)


@click.group(help=__doc__)
@click.option("--model", type=Path, default=EMBEDDED_MODEL)
@click.option("--sparsity", default="auto")
@click.option("--threads", type=int)
@click.option("--vram-budget", default=None)
@click.option("--kv-tokens", type=int)
@click.option("--max-pause", type=float, default=0.1)
@click.option("--max-running", type=int, default=32)
@click.option("--no-reuse", is_flag=True)
@click.pass_context
def main(
    context: click.Context,
    model: Path,
    sparsity: str,
    threads: int | None,
    vram_budget: Any,
    kv_tokens: int | None,
    max_pause: float,
    max_running: int,
    no_reuse: bool,
) -> None:
    config = EngineConfig(sparsity, threads=threads, vram_budget=vram_budget)
    context.obj = AsyncEngine.load(model, config, ServingConfig(kv_tokens, max_pause, max_running, 4096, not no_reuse))
    gc.collect()
    gc.freeze()  # as `hybrid serve` does
    click.echo(f"{context.obj.name}: {context.obj.plan.summary()}")


@main.command("batches")
@click.option("--sequences", default="1,2,4,8,16,32")
@click.option("--tokens", default=64)
@click.pass_obj
def run_batches(engine: AsyncEngine, sequences: str, tokens: int) -> None:
    async def measure() -> None:
        found: dict[int, float] = {}
        for count in map(int, sequences.split(",")):
            found[count] = max([await batch(engine, count, tokens) for _ in range(3)])
            click.echo(
                f"{count:3} sequences  {found[count]:9.1f} tokens/s  {found[count] / next(iter(found.values())):5.2f}x"
            )
        click.echo(json.dumps({"tokens_per_second": {str(count): round(rate, 2) for count, rate in found.items()}}))
        await engine.close()

    asyncio.run(measure())


@main.command("load")
@click.option("--share", default=0.8, help="Of the capacity that was measured.")
@click.option("--seconds", default=600.0)
@click.option("--tokens", default=64)
@click.option("--seed", default=0)
@click.pass_obj
def run_load(engine: AsyncEngine, share: float, seconds: float, tokens: int, seed: int) -> None:
    async def measure() -> None:
        found = await load(engine, share, seconds, tokens, seed)
        for name, value in found.items():
            click.echo(f"{name:28} {value}")
        click.echo(json.dumps(found))
        await engine.close()

    asyncio.run(measure())


async def prefix(engine: AsyncEngine, tokens: int) -> dict[str, Any]:
    """A prompt of so many tokens with an answer of 16, the chat's next turn of 24 more, and the first prompt again."""
    rng, settings = np.random.default_rng(0), SamplingSettings(temperature=0, max_new_tokens=16)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(6, engine.plan.spec.vocab_size, count).tolist())

    async def answer(prompt: tuple[int, ...]) -> tuple[tuple[int, ...], int, float]:
        steps = [served.step async for served in engine.generate(Request(prompt, settings))]
        stats = steps[-1].stats
        return tuple(step.token for step in steps), stats.cached_tokens, stats.ttft_seconds

    await answer(some(64))
    prompt = some(tokens)
    first, _, seconds = await answer(prompt)
    found: dict[str, Any] = {"prompt_tokens": tokens, "ttft_ms": round(1000 * seconds, 1)}
    for name, text in (("next_turn", prompt + first + some(24)), ("again", prompt)):
        _, cached, took = await answer(text)
        found |= {f"{name}_cached": cached, f"{name}_ttft_ms": round(1000 * took, 1)}
        found[f"{name}_share"] = round(took / seconds, 4)
    return found


@main.command("prefix")
@click.option("--tokens", default=1000)
@click.pass_obj
def run_prefix(engine: AsyncEngine, tokens: int) -> None:
    async def measure() -> None:
        found = await prefix(engine, tokens)
        for name, value in found.items():
            click.echo(f"{name:22} {value}")
        click.echo(json.dumps(found))
        await engine.close()

    asyncio.run(measure())


if __name__ == "__main__":
    main()
