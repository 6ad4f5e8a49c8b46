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
from hybrid.bench_report import BenchResult, csv_rows, json_line, report
from hybrid.bundle import EMBEDDED_MODEL
from hybrid.console import progress
from hybrid.engine import Engine, EngineConfig
from hybrid.errors import ContextError, InputError
from hybrid.ffn import STRATEGIES, FFNCounters, Strategy
from hybrid.generation import SamplingSettings
from hybrid.measurements import append_csv, origin
from hybrid.model import Transformer
from hybrid.peers import GreedyRun, LlamaCpp
from placement.plan import parse_size

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
    ) -> None:
        """Takes over the engine: its end tokens are dropped. Raises `ContextError` where the runs do not fit."""
        spec = engine.model.spec
        if config.context > engine.context:
            raise ContextError(
                f"{config.prompt_tokens} + {config.tokens} tokens exceed a context of {engine.context}; ask for fewer"
            )
        engine.end_tokens = frozenset()
        self._engine, self._config, self._peer = engine, config, peer
        every = STRATEGIES if spec.fires_sparsely else ("dense",)
        self.strategies = cast("tuple[Strategy, ...]", config.strategies or every)
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
        for strategy in self.strategies:
            self.ours(strategy, min(_WARM_UP_TOKENS, self._config.tokens))
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
        position = self._config.prompt_tokens + self._config.tokens / 2
        for strategy, total in counters.items():
            result.counters[strategy] = total
            result.bytes[strategy] = bytes_per_token(self._engine.model, strategy, total, position)
        return result

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


def bytes_per_token(model: Transformer, strategy: Strategy, counters: FFNCounters, position: float) -> dict[str, int]:
    """Bytes that a decode step must read with `position` tokens in the KV cache, by part, at the shares in `counters`.

    Matrices outside the FFN once, a row of the embedding, norms, keys and values in f32; biases are left out as small.
    FFN: dense reads all; exact the first matrix (gate, or up where there is none) of every neuron and the rest of those
    that fire; learned the first matrix of those predicted, and the rest of those of them that fire.
    """
    spec, blocks = model.spec, model.blocks
    fired = counters.fired / max(1, counters.neurons)
    predicted = counters.computed / max(1, counters.neurons)
    shares = {"dense": (1.0, 1.0), "exact": (1.0, fired), "learned": (predicted, fired)}
    first, rest = shares[strategy]
    rows = spec.n_layers * spec.d_ff * model.ffns[0].up.row_bytes
    norms = (2 * spec.n_layers + 1) * spec.d_model * (1 if spec.norm == "rms" else 2)
    lengths = [min(position, block.attention.window or position) for block in blocks]
    predictors = [ffn.predictor.nbytes for ffn in model.ffns if ffn.predictor is not None]
    return {
        "attention": sum(block.attention.qkv.matrix.nbytes + block.attention.out.matrix.nbytes for block in blocks),
        "keys and values": sum(spec.kv_bytes_per_layer(round(length)) for length in lengths),
        "predictor": sum(predictors) if strategy == "learned" else 0,
        "FFN": round(rows * (first + (spec.rows_per_neuron - 1) * rest)),
        "head": model.head.matrix.nbytes,
        "norms, embedding": 4 * norms + model.embedding.row_bytes,
    }


def bench(model: Path | None, options: Mapping[str, Any]) -> None:
    """The command: run, print ceiling, speeds and times, then one JSON line; add rows to the CSV where asked."""
    config = BenchConfig(
        tuple(filter(None, (options["sparsity"] or "").split(","))),
        *(options[name] for name in ("prompt_tokens", "tokens", "runs", "seed")),
    )
    if (options["peer"] is None) != (options["peer_model"] is None):
        raise InputError("--peer and --peer-model go together; give both or neither")
    budget = None if options["vram_budget"] is None else parse_size(options["vram_budget"])
    settings = EngineConfig(
        config.engine_sparsity, threads=options["threads"], bundle=options["bundle"], vram_budget=budget
    )
    with ExitStack() as stack:
        engine = stack.enter_context(Engine.load(model or EMBEDDED_MODEL, settings))
        spec, threads = engine.model.spec, engine.runtime.pool.threads
        peer = None
        if options["peer_model"] is not None:
            peer = stack.enter_context(closing(LlamaCpp(options["peer_model"], threads, config.context)))
            peer.refuse_other_shape(spec)
        runner = Bench(engine, config, peer)
        with progress("bench", runner.turns, "run") as advance:
            result = runner.run(advance)
    setting = origin() | {
        "model": model.absolute().name if model else "embedded",
        "dtype": spec.dtype,
        "threads": threads,
        "prompt_tokens": config.prompt_tokens,
        "tokens": config.tokens,
    }
    click.echo(report(result, setting, same_text=spec.activation == "silu"))
    if options["csv"]:
        append_csv(options["csv"], csv_rows(result, setting))
    click.echo(json_line(result, setting))
