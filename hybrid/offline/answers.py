"""What long answers of a strategy are like beside those of dense: where they part, and whether they get worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
import torch

from hybrid.model.ffn import FFNRuntime
from hybrid.model.transformer import Transformer
from hybrid.offline.evaluate import as_decode
from profiler.common.openmp import torch_threads
from profiler.common.spec import Strategy

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


def answers_quality(
    model: Transformer, runtime: FFNRuntime, strategy: Strategy, found: np.ndarray, dense: np.ndarray, known: int
) -> AnswersQuality:
    """Hold texts int64 [n, length], of which each begins with `known` >= 1 tokens of prompt, against those of dense."""
    parted, length = parted_after(found[:, known:], dense[:, known:]), found.shape[1] - known
    losses = _losses(model, runtime, found)[:, known - 1 :]
    return AnswersQuality(
        strategy=strategy,
        answers=len(found),
        tokens=length,
        parted=float(np.median(parted)),
        same=int((parted == length).sum()),
        perplexity=exp(losses.mean()),
        perplexity_of_ends=exp(losses[:, length // 2 :].mean()),
        distinct=float(np.mean([distinct_share(text) for text in found[:, known:].tolist()])),
    )


def parted_after(found: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """int64 [n]: how many tokens each row of `found` [n, t] begins with that are those of `dense`."""
    differs = np.pad(found != dense, ((0, 0), (0, 1)), constant_values=True)
    return differs.argmax(axis=1)


def distinct_share(tokens: Sequence[int], n: int = _NGRAM) -> float:
    """The share of runs of `n` tokens that are different; 1 where there is none."""
    runs = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def _losses(model: Transformer, runtime: FFNRuntime, texts: np.ndarray) -> np.ndarray:
    """f64 [n, length - 1]: minus the log of what the dense model gives each token but the first."""
    losses = np.empty((len(texts), texts.shape[1] - 1))
    with torch_threads(1), as_decode(runtime, "dense"):
        for row, text in zip(losses, torch.from_numpy(texts), strict=True):
            logs = model.logits(model(text)[:-1]).log_softmax(-1)
            row[:] = -logs.gather(1, text[1:, None])[:, 0].double().numpy()
    return losses
