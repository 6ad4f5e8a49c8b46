"""How fast the CPU reads prompts, beside what its cores can multiply and llama.cpp in turn.

    python scripts/bench_prefill.py MODEL [--peer GGUF] [--tokens 128,512,2048] [--threads N] [--runs 5]

First the peaks: products a second of the instructions that the tiles use, in registers alone, with all threads. Then
for each length: tokens/s of `precise` and `fast` and of the peer in turn, best and median of the runs; the share of the
peak that the weights' products alone are, of bf16 terms (`terms.py`) each times the products of terms that it takes;
and the median of the runs' ratios to the peer. The last line is JSON, its peaks in products of weights.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from numba import types
from numba.extending import intrinsic

from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import F32, I32, I64, LANES, Code, constant
from cpu_kernels.panels import CODES, FLOATS, form_of
from cpu_kernels.row_types import ROW_TYPES
from cpu_kernels.terms import STEP, TWO_TERMS, term_products, terms_in
from cpu_kernels.tile_unit import ROWS, TileUnit, tiles_usable
from cpu_kernels.tiles import Loop, add_pairs, tile_vectors
from cpu_kernels.worker_pool import WorkerPool, available_cpus
from hybrid import Engine, EngineConfig
from hybrid.console import counted, table
from hybrid.model.kv_cache import KVCache
from profiler.common.spec import ModelSpec

_PASSES = 20_000_000


def _peak(pairs: bool) -> Any:
    """A kernel that repeats the tiles' instruction on registers; each pass does it for each sum of a tile."""

    @intrinsic
    def repeat(typing_context: Any, passes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code = Code(context, builder)
            kind = I32 if pairs else F32
            start = builder.trunc(args[0], I32) if pairs else builder.sitofp(args[0], F32)
            factor = code.splat(start, LANES)
            loop = Loop(builder, args[0], [constant(kind, 0, LANES)] * tile_vectors(code))
            one = add_pairs if pairs else Code.fused
            found = loop.close([one(code, factor, factor, total) for total in loop.values])
            total = found[0]
            for vector in found[1:]:
                total = builder.add(total, vector) if pairs else builder.fadd(total, vector)
            last = builder.extract_element(total, I32(0))
            return builder.sitofp(last, F32) if pairs else last

        return types.float32(types.int64), generate

    @intrinsic
    def products(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return I64(tile_vectors(Code(context, builder)) * LANES * (2 if pairs else 1))

        return types.int64(), generate

    return _kernel(repeat, products)


def _tile_peak() -> Any:
    """As `_peak`, of the tile unit's instruction, for four sums as the tiles of terms have."""

    @intrinsic
    def repeat(typing_context: Any, passes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            unit = TileUnit(code := Code(context, builder))
            unit.configure()
            with code.each(args[0]):
                for tile in range(4):
                    unit.dot(tile, 4 + tile // 2, 6 + tile % 2)
            unit.release()
            return F32(0.0)

        return types.float32(types.int64), generate

    @intrinsic
    def products(typing_context: Any) -> Any:
        return types.int64(), lambda context, builder, signature, args: I64(4 * ROWS * LANES * STEP)

    return _kernel(repeat, products)


def _kernel(repeat: Any, products: Any) -> Any:
    @kernel
    def run(worker, workers, passes, out):  # type: ignore[no-untyped-def]
        out[worker, 0] = repeat(passes)
        out[worker, 1] = products()

    return run


def peak(form: np.ndarray, pool: WorkerPool) -> float:
    """Products a second of all threads by the instruction of a form (`panels.py`): of f32, 16-bit integers or bf16."""
    run = _tile_peak() if terms_in(form) else _peak(form is CODES)
    passes = _PASSES // 10 if terms_in(form) else _PASSES
    out, best = np.zeros((pool.threads, 2), np.float32), float("inf")
    pool.run(run, pool.threads, 1, out)
    for _ in range(3):
        start = time.perf_counter()
        pool.run(run, pool.threads, passes, out)
        best = min(best, time.perf_counter() - start)
    return pool.threads * passes * float(out[0, 1]) / best


def products_per_token(spec: ModelSpec) -> int:
    """Products of a prompt's token with weights, without the head, which its last token alone takes."""
    heads = (2 * spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    return spec.n_layers * spec.d_model * (heads + spec.d_ff * (3 if spec.gated else 2))


def reader(engine: Engine) -> Callable[[Sequence[int]], None]:
    """Reads a prompt into a cache of its own, piece by piece as an answer would."""
    runner, cache = engine.runner, KVCache(engine.model.spec, engine.context)

    def read(tokens: Sequence[int]) -> None:
        cache.truncate(0)
        for at in range(0, len(tokens), runner.chunk):
            runner.read(tokens[at : at + runner.chunk], len(tokens), cache)

    return read


def peer_reader(path: Path, context: int, threads: int) -> Callable[[Sequence[int]], None]:
    import llama_cpp  # extra `peers`

    sizes = {"n_ctx": context, "n_batch": context, "n_ubatch": 512, "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(path), verbose=False, **sizes)

    def read(tokens: Sequence[int]) -> None:
        model.reset()
        model.eval(list(tokens))

    return read


def in_turn(
    ways: dict[str, Callable[[Sequence[int]], None]], tokens: Sequence[int], runs: int
) -> dict[str, list[float]]:
    """Seconds of each way's runs, one of each after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, read in ways.items():
            start = time.perf_counter()
            read(tokens)
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--peer", type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", default="128,512,2048", callback=lambda _, __, text: [int(n) for n in text.split(",")])
@click.option("--threads", type=int, default=available_cpus())
@click.option("--runs", type=int, default=5)
@click.option("--seed", type=int, default=0)
def main(model: Path, peer: Path | None, tokens: list[int], threads: int, runs: int, seed: int) -> None:
    pool = WorkerPool(threads)
    forms: dict[str, np.ndarray] = {"precise": form_of("precise"), "fast": form_of("fast")}
    known = {name: peak(form, pool) for name, form in (("f32", FLOATS), ("16-bit integers", CODES))}
    if tiles_usable():
        known["bf16 tiles"] = peak(TWO_TERMS, pool)
    pool.close()
    context = max(tokens)
    settings = [EngineConfig("dense", context, threads, vram_budget=0, prefill=way) for way in ("precise", "fast")]
    precise, fast = (Engine.load(model, config) for config in settings)
    with closing(precise), closing(fast):
        spec = precise.model.spec
        each = products_per_token(spec)
        click.echo(f"{model.name}: {spec.dtype}, {each / 1e9:.2f} G products a token; {counted(threads, 'thread')}")
        click.echo(f"peak: {', '.join(f'{name} {found / 1e9:.0f}' for name, found in known.items())} G products/s")
        kind = ROW_TYPES[spec.dtype]
        peaks = {
            way: known["bf16 tiles"] / term_products(form, kind) if terms_in(form) else known[plain]
            for (way, form), plain in zip(forms.items(), ("f32", "16-bit integers"), strict=True)
        }
        ways = {"precise": reader(precise), "fast": reader(fast)}
        ways |= {"llama.cpp": peer_reader(peer, context, threads)} if peer else {}
        rows, generator = [], random.Random(seed)
        for count in tokens:
            prompt = [generator.randrange(spec.vocab_size) for _ in range(count)]
            for name, seconds in (found := in_turn(ways, prompt, runs)).items():
                ratios = [theirs / ours for ours, theirs in zip(seconds, found.get("llama.cpp", seconds), strict=True)]
                best = count / min(seconds)
                rows.append(
                    {
                        "tokens": count,
                        "way": name,
                        "best": round(best, 1),
                        "median": round(count / statistics.median(seconds), 1),
                        "share": round(best * each / peaks[name], 3) if name in peaks else None,
                        "ratio": round(statistics.median(ratios), 2) if peer else None,
                    }
                )
    header = ["tokens", "way", "tok/s, best", "median", "of the peak", "over llama.cpp"]
    click.echo(table(header, [["-" if value is None else f"{value}" for value in row.values()] for row in rows]))
    click.echo(json.dumps({"model": model.name, "dtype": spec.dtype, "threads": threads, "peaks": peaks, "rows": rows}))


if __name__ == "__main__":
    main()
