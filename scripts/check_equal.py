"""Whether a strategy that promises no loss keeps it: logits over real text, and answers, held against dense.

    python scripts/check_equal.py MODEL --corpus FILE --tokens 100000 --answers 20

Text is read 32 tokens at a time as rows of the decode step, so that every token is computed as decode does. On the CPU
the logits must have the same bits. Answers are greedy, each after the first tokens of a window, one token at a time.
Exit code 1 where anything differs. Prints a line of JSON last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch

from cpu_kernels.contract import MAX_BATCH
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.console import progress
from hybrid.formats.bundle import EMBEDDED_CORPUS, EMBEDDED_MODEL
from hybrid.model.kv_cache import KVCache, Row
from hybrid.offline.project import ProfileRequest, Project
from hybrid.runtime.cpu_step import CpuStep
from profiler.common.openmp import torch_threads
from profiler.common.spec import Strategy

_PROMPT, _ANSWER = 32, 200


def read(step: CpuStep, cache: KVCache, tokens: list[int], strategy: Strategy) -> torch.Tensor:
    """Logits [t, vocab] after each of `tokens`, from an empty cache."""
    cache.truncate(0)
    found = []
    for first in range(0, len(tokens), MAX_BATCH):
        rows = [Row(cache, token) for token in tokens[first : first + MAX_BATCH]]
        found.append(step.rows(rows, strategy).clone())
    return torch.cat(found)


def differences(step: CpuStep, cache: KVCache, tokens: list[int], strategy: Strategy) -> tuple[int, int]:
    """Tokens whose logits differ in a bit from dense, and whose likeliest token does."""
    dense, ours = (read(step, cache, tokens, way) for way in ("dense", strategy))
    apart = (dense != ours).any(1)
    return int(apart.sum()), int((dense.argmax(1) != ours.argmax(1)).sum())


def answer(engine: Engine, prompt: list[int], strategy: Strategy) -> list[int]:
    """Greedy tokens after `prompt`."""
    engine.reset()
    engine.runtime.strategy = strategy
    settings = SamplingSettings(temperature=0, max_new_tokens=min(_ANSWER, engine.context - len(prompt)))
    return [step.token for step in engine.generate(prompt, settings)]


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--sparsity", type=click.Choice(["exact", "certified"]), default="certified", show_default=True)
@click.option("--corpus", type=click.Path(path_type=Path), multiple=True, help="Text  [default: the embedded model's]")
@click.option("--tokens", type=click.IntRange(2), default=100_000, show_default=True)
@click.option("--window", type=click.IntRange(_PROMPT), default=256, show_default=True)
@click.option("--answers", type=click.IntRange(0), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1))
@click.option("--bundle", type=click.Path(path_type=Path))
def main(model: Path | None, sparsity: Any, corpus: tuple[Path, ...], tokens: int, window: int, **given: Any) -> None:
    """Hold `sparsity` against dense on the CPU."""
    model = model or EMBEDDED_MODEL
    project = Project(model, given["bundle"], given["threads"], progress, click.echo)
    request = ProfileRequest(corpus or (EMBEDDED_CORPUS / "calibration.jsonl",), tokens, window, skip_bad=True)
    texts = project.windows(request).tokens.tolist()
    config = EngineConfig(sparsity, window + _ANSWER, given["threads"], given["bundle"], vram_budget=0)
    counts, parted = [0, 0], 0
    with Engine.load(model, config) as engine, torch.inference_mode(), torch_threads(1):
        if engine.plan.strategy != sparsity:
            raise click.ClickException("; ".join(engine.notices))
        cache = KVCache(engine.model.spec, window)
        step = CpuStep(engine.model, cache, engine.runtime)
        with progress("text", len(texts), "window") as advance:
            for text in texts:
                counts = [a + b for a, b in zip(counts, differences(step, cache, text, sparsity), strict=True)]
                advance(1)
        prompts = [text[:_PROMPT] for text in texts[:: max(1, len(texts) // max(1, given["answers"]))]]
        answered = 0
        for prompt in prompts[: given["answers"]]:
            ways: tuple[Strategy, ...] = ("dense", sparsity)
            one, other = (answer(engine, prompt, way) for way in ways)
            answered += len(one)
            parted += one != other
    result = {
        "model": str(model), "strategy": sparsity, "tokens": sum(map(len, texts)), "logits_differ": counts[0],
        "likeliest_differ": counts[1], "answers": given["answers"], "answered_tokens": answered,
        "answers_differ": parted,
    }  # fmt: skip
    click.echo(json.dumps(result))
    sys.exit(1 if any(counts) or parted else 0)


if __name__ == "__main__":
    main()
