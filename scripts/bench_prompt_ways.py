"""Times of prompts of which the CPU computes a given share of the cold neurons, while the others go to the GPU.

    python scripts/bench_prompt_ways.py MODEL --vram-budget 8GiB [--tokens 64,512] [--shares 0,0.05,0.1,0.2,0.3]

For each length the time to the first token with each share forced on every layer, in turn, and with what the cost
model chooses: best and median, beside what the model expects of its choice. Then, of one layer, where the CPU's time
goes: norms, QKV, attention, the output's product and the FFN, and an FFN of few tokens, which is little but bringing
weights into panels. Without a GPU, or with `--vram-budget 0`, that alone. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from hybrid import Engine, EngineConfig
from hybrid.bench.devices import gpu_runner
from hybrid.console import table
from hybrid.generation import SamplingSettings
from hybrid.model.kv_cache import KVCache
from placement.plan import parse_size
from profiler.common.openmp import torch_threads

_FEW = 12  # tokens whose products take less than bringing the weights into panels


def first_token(engine: Engine, tokens: int, share: float | None) -> float:
    """Seconds to the first token after a prompt."""
    runner = gpu_runner(engine)
    assert runner is not None
    runner.prefill.cpu_share = share
    engine.reset()
    prompt = torch.randint(16, engine.model.spec.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    step = next(engine.generate(prompt.tolist(), SamplingSettings(temperature=0, max_new_tokens=1)))
    return step.stats.ttft_seconds


def splits(engine: Engine, lengths: Sequence[int], shares: Sequence[float], runs: int) -> list[dict[str, Any]]:
    """A row for each length and share, the last of a length for the cost model's choice."""
    runner, rows = gpu_runner(engine), []
    assert runner is not None
    for tokens in lengths:
        ways: list[float | None] = [*shares, None]
        seconds: dict[float | None, list[float]] = {share: [] for share in ways}
        for _ in range(runs + 1):
            for share in ways:
                seconds[share].append(first_token(engine, tokens, share))
        for share, found in seconds.items():
            row = {"tokens": tokens, "share": share, "best": min(found[1:]), "median": statistics.median(found[1:])}
            rows.append(row | {"predicted": runner.expected_seconds(tokens) if share is None else None})
    return rows


def layer_parts(engine: Engine, tokens: int, runs: int) -> dict[str, float]:
    """Seconds of the parts of the first layer by the CPU alone; the best of the runs."""
    model, spec = engine.model, engine.model.spec
    engine.runner.rest()
    engine.runtime.as_decode = False
    block, cache = model.blocks[0], KVCache(spec, tokens)
    x = torch.randn(tokens, spec.d_model)
    rotations = model.rotations(torch.arange(tokens))
    qkv, attended = block.attention.qkv(x), torch.randn(tokens, spec.n_heads * spec.head_dim)
    ways: dict[str, Callable[[], Any]] = {
        "norm": lambda: x if block.norms.ffn is None else block.norms.ffn(x, engine.runtime.pool),
        "qkv": lambda: block.attention.qkv(x),
        "attention": lambda: block.attention.attend(qkv.clone(), rotations, cache),
        "out": lambda: block.attention.out(attended),
        "ffn": lambda: block.ffn.every(x),
        f"ffn of {_FEW}": lambda: block.ffn.every(x[:_FEW]),
        "layer": lambda: block(x, rotations, cache),
    }
    found = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode(), torch_threads(1):
        for _ in range(runs + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                found[name] = min(found[name], time.perf_counter() - start)
    return found


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    return [kind(part) for part in text.split(",")]


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--vram-budget", default="8GiB", callback=lambda _, __, text: parse_size(text))
@click.option("--tokens", default="64,512", callback=lambda _, __, text: numbers(text, int))
@click.option("--shares", default="0,0.05,0.1,0.2,0.3", callback=lambda _, __, text: numbers(text, float))
@click.option("--runs", type=click.IntRange(1), default=5)
@click.option("--prefill", type=click.Choice(["precise", "fast"]))
@click.option("--threads", type=click.IntRange(1))
def main(
    model: Path,
    vram_budget: int,
    tokens: list[int],
    shares: list[float],
    runs: int,
    prefill: Any,
    threads: int | None,
) -> None:
    given = {"prefill": prefill} if prefill else {}
    config = EngineConfig("dense", max(tokens) + 1, threads, vram_budget=vram_budget, **given)
    with Engine.load(model, config) as engine:
        ways = [] if gpu_runner(engine) is None else splits(engine, tokens, shares, runs)
        parts = {count: layer_parts(engine, count, runs) for count in tokens}
        workers = engine.runtime.pool.threads
    if ways:
        cells = [
            [
                f"{row['tokens']}",
                "chosen" if row["share"] is None else f"{row['share']:.0%}",
                *("-" if row[key] is None else f"{1e3 * row[key]:.1f}" for key in ("best", "median", "predicted")),
            ]
            for row in ways
        ]
        click.echo(table(["tokens", "by the CPU", "TTFT ms, best", "median", "predicted"], cells))
    names = list(next(iter(parts.values())))
    rows = [[f"{count}", *(f"{1e3 * found[name]:.2f}" for name in names)] for count, found in parts.items()]
    click.echo(table(["tokens", *(f"{name} ms" for name in names)], rows))
    click.echo(json.dumps({"model": model.name, "threads": workers, "ways": ways, "layer": parts}))


if __name__ == "__main__":
    main()
