"""What long answers of a strategy are like beside those of dense: where they part, and whether they get worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
import torch

from hybrid.model.ffn import FFNRuntime
from hybrid.model.transformer import Transformer
from hybrid.offline.evaluate import as_decode
from profiler.common.openmp import torch_threads
from profiler.common.progress import Progress, no_progress
from profiler.common.spec import Strategy
from profiler.corpus import TokenWindows

_NGRAM = 4


@dataclass(frozen=True)
class AnswersQuality:
    """One strategy's answers to the same prompts as dense.

    parted: after how many tokens the median answer parts from that of dense, where one that never does counts as its
    length; same: how many never do. perplexity: of all answers' tokens, and of those of their second halves, under the
    dense model. distinct: the share of runs of 4 tokens in an answer that are different, on the mean.
    """

    strategy: Strategy
    answers: int
    tokens: int
    parted: float
    same: int
    perplexity: float
    perplexity_of_ends: float
    distinct: float


def beginnings(windows: TokenWindows, tokens: int) -> np.ndarray:
    """int64 [n, tokens]: how the documents in `windows` begin, but those of fewer tokens."""
    flat, owners = windows.tokens.ravel(), windows.documents.ravel()
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    starts = starts[starts + tokens <= len(flat)]
    starts = starts[owners[starts + tokens - 1] == owners[starts]]
    return flat[starts[:, None] + np.arange(tokens)]


def answers_quality(
    model: Transformer,
    runtime: FFNRuntime,
    strategies: Sequence[Strategy],
    texts: Sequence[np.ndarray],
    known: int,
    progress: Progress = no_progress,
) -> list[AnswersQuality]:
    """What to say of each strategy's texts int64 [n, length], dense first; each begins with `known` >= 1 tokens of
    prompt."""
    unique, where = np.unique(np.concatenate(texts), axis=0, return_inverse=True)
    with progress("perplexity", unique.size) as advance:
        losses = _losses(model, runtime, unique, advance)[where.ravel(), known - 1 :]
    of_each = np.split(losses, len(texts))
    return [
        _quality(strategy, found[:, known:], texts[0][:, known:], lost)
        for strategy, found, lost in zip(strategies, texts, of_each, strict=True)
    ]


def _quality(strategy: Strategy, found: np.ndarray, dense: np.ndarray, losses: np.ndarray) -> AnswersQuality:
    """Of answers [n, t], and minus the log of what dense gives each of their tokens."""
    parted, tokens = parted_after(found, dense), found.shape[1]
    return AnswersQuality(
        strategy=strategy,
        answers=len(found),
        tokens=tokens,
        parted=float(np.median(parted)),
        same=int((parted == tokens).sum()),
        perplexity=exp(losses.mean()),
        perplexity_of_ends=exp(losses[:, tokens // 2 :].mean()),
        distinct=float(np.mean([distinct_share(text) for text in found.tolist()])),
    )


def parted_after(found: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """int64 [n]: how many tokens each row of `found` [n, t] begins with that are those of `dense`."""
    differs = np.pad(found != dense, ((0, 0), (0, 1)), constant_values=True)
    return differs.argmax(axis=1)


def distinct_share(tokens: Sequence[int], n: int = _NGRAM) -> float:
    """The share of runs of `n` tokens that are different; 1 where there is none."""
    runs = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def _losses(model: Transformer, runtime: FFNRuntime, texts: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    """f64 [n, length - 1]: minus the log of what the dense model gives each token but the first."""
    losses = np.empty((len(texts), texts.shape[1] - 1))
    with torch_threads(1), as_decode(runtime, "dense"):
        for row, text in zip(losses, torch.from_numpy(texts), strict=True):
            logs = model.logits(model(text)[:-1]).log_softmax(-1)
            row[:] = -logs.gather(1, text[1:, None])[:, 0].double().numpy()
            advance(len(text))
    return losses
