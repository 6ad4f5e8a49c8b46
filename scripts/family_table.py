"""Every family against transformers, on small random models in f32: largest relative error and greedy agreement.

    python scripts/family_table.py

The models are those of the tests (`tests/model_cases.py`). A row: the largest difference of logits over the largest
logit, of a prompt of 64 tokens, and of 40 tokens that the compiled step decodes after one of 24, dense and, where the
family fires sparsely, exact; and how many of 64 greedy tokens are those that transformers finds likeliest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.loader import ModelFolder
from hybrid.model.transformer import Transformer
from hybrid.runtime.cpu_step import CpuStep
from profiler.common.spec import Strategy

PROMPT, DECODED, ANSWER = 24, 40, 64
CONTEXT = PROMPT + ANSWER


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def decoded(model: Transformer, text: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """Logits after each token of `text` from the prompt on, by the compiled step."""
    cache = KVCache(model.spec, CONTEXT)
    model(text[:PROMPT], cache)
    step = CpuStep(model, cache, model.ffns[0].runtime)
    return torch.stack([step.run(int(token), strategy).clone() for token in text[PROMPT:]])


def answer(model: Transformer, prompt: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """The prompt and the greedy tokens after it."""
    cache, tokens = KVCache(model.spec, CONTEXT), prompt.tolist()
    step = CpuStep(model, cache, model.ffns[0].runtime)
    logits = model.logits(model(prompt, cache)[-1:])[0]
    for _ in range(ANSWER):
        tokens.append(int(logits.argmax()))
        if cache.length < CONTEXT:
            logits = step.run(tokens[-1], strategy)
    return torch.tensor(tokens)


@torch.inference_mode()
def row(name: str, truth: Any, folder: Path) -> list[str]:
    """One line of the table."""
    opened = ModelFolder.open(folder)
    spec = opened.spec
    model = opened.build(FFNRuntime("dense", WorkerPool(1), spec.d_model, spec.d_ff), None, None)
    text = torch.randint(0, spec.vocab_size, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(0))
    theirs = truth(text[None]).logits[0]
    sparse: Strategy = "exact" if spec.fires_sparsely else "dense"
    errors = [error(model.logits(model(text)), theirs), error(decoded(model, text, "dense"), theirs[PROMPT:])]
    errors += [error(decoded(model, text, sparse), theirs[PROMPT:])] if spec.fires_sparsely else []
    told = answer(model, text[:PROMPT], sparse)
    likeliest = truth(told[None, :-1]).logits[0, PROMPT - 1 :].argmax(-1)
    agree = int((told[PROMPT:] == likeliest).sum())
    cells = [f"{value:.1e}" for value in errors] + [""] * (3 - len(errors))
    return [name, spec.family, spec.activation, *cells, f"{agree} of {ANSWER}"]


@click.command(help=__doc__)
def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from model_cases import CASES, make_model

    titles = ("model", "family", "activation", "prompt", "decode, dense", "decode, exact", "greedy tokens")
    click.echo(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name in CASES:
        with TemporaryDirectory() as folder:
            truth = make_model(name, Path(folder), max_position_embeddings=CONTEXT)
            click.echo(f"| {' | '.join(row(name, truth, Path(folder)))} |")


if __name__ == "__main__":
    main()
