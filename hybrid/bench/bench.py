"""`hybrid bench`: how fast a model answers, held against what this machine's memory allows.

Decoding a token is reading weights, so the ceiling is the read bandwidth over the bytes that a token needs. Strategies
and peer take turns, run by run, in one process over the same weights, and the bandwidth is measured anew before every
round: what slows the machine for a while slows all of them. Greedy, over random prompts; end tokens do not end a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from cpu_kernels.bandwidth import BUFFER_BYTES, BandwidthProbe
from hybrid.bench.ceiling import bytes_per_token
from hybrid.bench.devices import GpuFacts, PrefillWays, gpu_facts, gpu_result, gpu_runner
from hybrid.bench.measurements import append_csv, origin
from hybrid.bench.peers import GreedyRun, LlamaCpp
from hybrid.bench.report import BenchResult, csv_rows, json_line, report
from hybrid.bench.rows import rows_result
from hybrid.console import progress
from hybrid.errors import ContextError, InputError
from hybrid.formats.bundle import EMBEDDED_MODEL, Bundle
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNCounters
from hybrid.model.loader import ModelFolder
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.devices import gpu_of
from hybrid.runtime.engine import Engine
from profiler.common.spec import NAMING, STRATEGIES, Strategy

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class BenchConfig:
    """What to run; checked when built, raising `InputError`.

    strategies: empty takes all that have a meaning for the model. tokens: generated per run; the first of them comes
    from the prompt's pass, the others are what decode speed is measured on.
    """

    strategies: tuple[str, ...] = ()
    prompt_tokens: int = 128
    tokens: int = 128
    runs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"prompt_tokens": 1, "tokens": 2, "runs": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        known = set(self.strategies) <= set(STRATEGIES)
        if not known or len(set(self.strategies)) < len(self.strategies):
            listed = ",".join(self.strategies)
            raise InputError(f"--sparsity {listed!r} is no list of different ones of {', '.join(STRATEGIES)}")

    @property
    def context(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.tokens

    @property
    def engine_sparsity(self) -> str:
        """The strategy to load an engine for, so that it can run all of `strategies`."""
        return max(self.strategies, key=STRATEGIES.index, default="auto")


class Bench:
    """An engine, and maybe a peer, that run the same prompts in turn."""

    def __init__(
        self,
        engine: Engine,
        config: BenchConfig,
        peer: LlamaCpp | None = None,
        probe_bytes: int = BUFFER_BYTES,
        gpu: GpuFacts | None = None,
    ) -> None:
        """Takes over the engine: its end tokens are dropped. `gpu` is for one on two devices, which needs it.

        Raises `ContextError` where the runs do not fit.
        """
        spec = engine.model.spec
        if config.context > engine.context:
            raise ContextError(
                f"{config.prompt_tokens} + {config.tokens} tokens exceed a context of {engine.context}; ask for fewer"
            )
        if gpu is None and gpu_runner(engine) is not None:
            raise ValueError("an engine that uses a GPU is measured with what is known of the GPU; give `gpu`")
        engine.end_tokens = frozenset()
        self._engine, self._config, self._peer = engine, config, peer
        self._gpu = None if gpu_runner(engine) is None else gpu
        # Up to what the engine was loaded for: a model without predictors has no learned, a dense one nothing sparse.
        loaded = engine.plan.strategy
        others = [strategy for strategy in config.strategies if strategy in NAMING and strategy != loaded]
        if others:
            told = "; ".join(["measure it by itself", *engine.notices])
            raise InputError(f"{others[0]} does not run in an engine that was loaded for {loaded}: {told}")
        lossless = ("dense", "exact") if spec.fires_sparsely else ("dense",)
        every = [*(s for s in STRATEGIES[: STRATEGIES.index(loaded)] if s in lossless), loaded]
        self.strategies = cast("tuple[Strategy, ...]", config.strategies or tuple(every))
        prompt = np.random.default_rng(config.seed).integers(0, spec.vocab_size, config.prompt_tokens)
        self._prompt: list[int] = prompt.tolist()
        self._probe = BandwidthProbe(engine.runtime.pool, probe_bytes)

    @property
    def turns(self) -> int:
        """How often `run` calls its `advance`."""
        return self._config.runs * (len(self.strategies) + (self._peer is not None))

    def run(self, advance: Callable[[int], None]) -> BenchResult:
        """Warm up, then measure all in turn; `advance` is called with 1 after each run."""
        result = BenchResult({strategy: [] for strategy in self.strategies}, {})
        counters = {strategy: FFNCounters() for strategy in self.strategies}
        prefill = dict[str, PrefillWays]()
        for strategy in self.strategies:
            before = PrefillWays.so_far(self._engine)
            self.ours(strategy, min(_WARM_UP_TOKENS, self._config.tokens))
            prefill[strategy] = PrefillWays.so_far(self._engine).since(before)
        if self._peer is not None:
            self._peer.generate(self._prompt, min(_WARM_UP_TOKENS, self._config.tokens))
        for _ in range(self._config.runs):
            result.bandwidths.append(self._probe.measure())
            result.cores.append(self._probe.cores)
            for strategy in self.strategies:
                result.runs[strategy].append(self.ours(strategy, self._config.tokens))
                _add(counters[strategy], self._engine.runtime.counters)
                advance(1)
            if self._peer is not None:
                result.peer_runs.append(self._peer.generate(self._prompt, self._config.tokens))
                advance(1)
        self._explain(result, counters, prefill)
        return result

    def _explain(
        self, result: BenchResult, counters: dict[Strategy, FFNCounters], prefill: dict[str, PrefillWays]
    ) -> None:
        """Add to the runs what they are held against."""
        position = self._config.prompt_tokens + self._config.tokens / 2
        if self._gpu is not None:
            result.gpu = gpu_result(self._engine, self._gpu, counters, prefill, position, self._config.prompt_tokens)
        for strategy, total in counters.items():
            result.counters[strategy] = total
            if result.gpu is None:
                result.bytes[strategy] = bytes_per_token(self._engine.model, strategy, total, position)
            else:
                result.bytes[strategy] = result.gpu.steps[strategy].parts

    def ours(self, strategy: Strategy, count: int) -> GreedyRun:
        """One run of the engine from an empty cache; its counters stay in the engine's runtime."""
        self._engine.reset()
        self._engine.runtime.strategy = strategy
        tokens, times = list[int](), list[float]()
        for step in self._engine.generate(self._prompt, SamplingSettings(temperature=0, max_new_tokens=count)):
            tokens.append(step.token)
            times.append(step.stats.decode_seconds)
        return GreedyRun(len(self._prompt), tuple(tokens), step.stats.ttft_seconds, tuple(np.diff(times).tolist()))


def _add(total: FFNCounters, more: FFNCounters) -> None:
    for each in fields(FFNCounters):
        setattr(total, each.name, getattr(total, each.name) + getattr(more, each.name))


def bench(model: Path | None, options: Mapping[str, Any]) -> None:
    """The command: run, then print ceiling, speeds and times, or one JSON line; add rows to the CSV where asked."""
    config = BenchConfig(
        tuple(filter(None, (options["sparsity"] or "").split(","))),
        *(options[name] for name in ("prompt_tokens", "tokens", "runs", "seed")),
    )
    if (options["peer"] is None) != (options["peer_model"] is None):
        raise InputError("--peer and --peer-model go together; give both or neither")
    settings = engine_settings(config.engine_sparsity, options)
    path = model or EMBEDDED_MODEL
    gpu = facts_of(path, settings)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine.load(path, settings))
        spec, threads = engine.model.spec, engine.runtime.pool.threads
        peer = None
        if options["peer_model"] is not None:
            peer = stack.enter_context(closing(LlamaCpp(options["peer_model"], threads, config.context)))
            peer.refuse_other_shape(spec)
        runner = Bench(engine, config, peer, gpu=gpu)
        with progress("bench", runner.turns, "run") as advance:
            result = runner.run(advance)
        result.rows = rows_result(engine)
        setting = setting_of(model, engine, config)
    if options["csv"]:
        append_csv(options["csv"], csv_rows(result, setting))
    same_text = spec.activation == "silu"
    click.echo(json_line(result, setting) if options["json"] else report(result, setting, same_text))


def engine_settings(sparsity: str, options: Mapping[str, Any]) -> EngineConfig:
    """How the command's options ask to load an engine."""
    names = ("context", "threads", "bundle", "vram_budget", "kv", "prefill")
    return EngineConfig(sparsity, **{name: options[name] for name in names})


def facts_of(model: Path, settings: EngineConfig) -> GpuFacts | None:
    """What is known of the GPU before an engine is loaded; None where none is to be used."""
    gpu = gpu_of(settings.vram_budget)
    if gpu is None:
        return None
    folder = ModelFolder.open(model)
    return gpu_facts(gpu, Bundle.of(folder.path, folder.spec, settings.bundle), folder.spec, settings.vram_budget)


def setting_of(model: Path | None, engine: Engine, config: BenchConfig) -> dict[str, Any]:
    """The columns that begin every row."""
    return origin() | {
        "model": model.absolute().name if model else "embedded",
        "dtype": engine.model.spec.dtype,
        "threads": engine.runtime.pool.threads,
        "prompt_tokens": config.prompt_tokens,
        "tokens": config.tokens,
    }
