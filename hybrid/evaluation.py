"""The tables of `hybrid eval`: each strategy over a corpus, the predictors' thresholds, and long answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid.console import percent, progress, table
from hybrid.errors import InputError
from hybrid.generation import SamplingSettings
from hybrid.offline.answers import answers_quality, beginnings
from hybrid.offline.evaluate import StrategyQuality
from hybrid.offline.evaluate import evaluate as evaluate_strategies
from hybrid.offline.project import Project
from hybrid.runtime.continuation import continued
from predictor.bank import PredictorBank
from predictor.report import CurvePoint
from profiler.common.spec import Strategy
from profiler.corpus import TokenWindows

_PROMPT = 64  # tokens of a document that its answer goes on from


def _change(value: float, base: float) -> str:
    """Relative change in per cent; rounded before its sign is printed, so that none is `-0.00%`."""
    return f"{round(value / base - 1, 5) + 0.0:+.3%}"


def strategies_of(project: Project) -> tuple[list[Strategy], PredictorBank | None]:
    """What is evaluated: dense, and of a model that fires sparsely what its bundle has artefacts for; without any,
    learned, whose absence is then said. Copies of rows are taken into use. With them the predictors, if they are."""
    sparse = project.spec.fires_sparsely
    strategies: list[Strategy] = ["dense", "exact"] if sparse else ["dense"]
    if sparse and project.bundle.copies.is_file():
        project.folder.use_copies(project.model.ffns, project.bundle)
        strategies.append("certified")
    if not sparse or ("certified" in strategies and not project.bundle.predictors.is_file()):
        return strategies, None
    return [*strategies, "learned"], project.load_predictors()


def curve_report(
    project: Project, bank: PredictorBank, points: Sequence[CurvePoint], windows: TokenWindows, dense: float, kv: Any
) -> str:
    """Perplexity along the report's curve; recall and precision are those of the report's validation text."""
    rows = []
    with progress("curve", windows.tokens.size * len(points)) as advance:
        for point in points:
            project.use_predictors(bank.with_thresholds(point.thresholds))
            of = project.model, project.runtime
            quality = evaluate_strategies(*of, ["learned"], windows, advance, kv)[-1]
            rows.append(
                [
                    percent(quality.computed_share),
                    f"{point.active_ratio:.2f}",
                    percent(point.recall),
                    percent(point.precision),
                    f"{point.level:.2%}",
                    f"{quality.perplexity:.3f}",
                    _change(quality.perplexity, dense),
                ]
            )
    header = ["predicted", "of those firing", "recall", "precision", "missed mass", "perplexity", "vs dense"]
    return table(header, rows)


def quality_report(found: list[StrategyQuality]) -> str:
    """One row per strategy, the first of which is what the others are held against."""
    dense = found[0].perplexity
    rows = [
        [
            ", ".join(
                [q.strategy, *([f"KV {q.kv}"] if q.kv else []), *(["prefill fast"] if q.prefill == "fast" else [])]
            ),
            f"{q.perplexity:.4f}",
            _change(q.perplexity, dense),
            f"{q.kl:.5f}",
            f"{q.top1_agreement:.2%}",
            percent(q.computed_share),
            percent(q.fired_share),
        ]
        for q in found
    ]
    header = ["strategy", "perplexity", "vs dense", "KL (nats)", "top-1 agree", "computed", "fired"]
    return f"{table(header, rows)}\n{found[0].tokens:,} predicted tokens"


def answer_prompts(project: Project, windows: TokenWindows, answers: int, tokens: int) -> np.ndarray:
    """int64 [answers, t]: beginnings of documents. Raises `InputError` where there are too few, or the model does not
    take `tokens` more."""
    prompts = beginnings(windows, min(_PROMPT, windows.tokens.shape[1]))
    known = prompts.shape[1]
    if answers > len(prompts):
        raise InputError(
            f"--answers {answers} wants as many documents of {known} tokens, {len(prompts)} begin in the text that is "
            "evaluated; raise --tokens"
        )
    project.check_context(known + tokens)
    return prompts[:answers]


def answers_report(project: Project, strategies: Sequence[Strategy], prompts: np.ndarray, tokens: int) -> str:
    """One row per strategy, dense first, of its greedy answers of `tokens` tokens to prompts int64 [n, t]."""
    answers, known = prompts.shape
    of, length, greedy = (project.model, project.runtime), known + tokens, SamplingSettings(temperature=0)
    with progress("answers", answers * tokens * len(strategies)) as advance:
        texts = [continued(*of, strategy, prompts, length, greedy, advance) for strategy in strategies]
    found = answers_quality(*of, strategies, texts, known, progress)
    rows = [
        [
            q.strategy,
            f"{q.parted:.0f}",
            f"{q.same} of {q.answers}",
            f"{q.perplexity:.3f}",
            f"{q.perplexity_of_ends:.3f}",
            f"{q.distinct:.1%}",
        ]
        for q in found
    ]
    header = ["answers", "part after", "never", "perplexity", "of second halves", "distinct 4-grams"]
    return f"{table(header, rows)}\n{tokens} greedy tokens each; perplexity is that of the answers under dense"
