"""The tables of `hybrid eval`: each strategy over a corpus, the predictors' thresholds, and long answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cpu_kernels.contract import Precision
from hybrid.console import percent, progress, table
from hybrid.errors import InputError
from hybrid.generation import SamplingSettings
from hybrid.offline.answers import answers_quality, beginnings
from hybrid.offline.evaluate import StrategyQuality
from hybrid.offline.evaluate import evaluate as evaluate_strategies
from hybrid.offline.project import Project
from hybrid.offline.proxies import Proxies, maker_of
from hybrid.runtime.continuation import continued
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.report import CurvePoint
from profiler.common.spec import KVChoice, Strategy
from profiler.corpus import TokenWindows

_PREDICTORS = ["predicted", "of those firing", "recall", "precision", "missed mass", "perplexity", "vs dense"]
_PROXIES = ["computed", "left out", "perplexity", "vs dense"]
_PROMPT = 64  # tokens of a document that its answer goes on from


def _change(value: float, base: float) -> str:
    """Relative change in per cent; rounded before its sign is printed, so that none is `-0.00%`."""
    return f"{round(value / base - 1, 5) + 0.0:+.3%}"


def eval_reports(
    project: Project,
    windows: TokenWindows,
    *,
    kv: KVChoice,
    prefill: Precision,
    curve: bool,
    answers: int,
    answer_tokens: int,
) -> Iterator[str]:
    """The tables, as they are ready: of each strategy; with `curve` of the thresholds; of so many long answers. Raises
    `InputError` before the first where there cannot be such answers."""
    prompts = answer_prompts(project, windows, answers, answer_tokens) if answers else None
    by = maker_of(project, progress)
    strategies, bank = strategies_of(project, by)
    by.use_predictors(bank)  # type: ignore[arg-type]  # of its own kind
    with progress("eval", windows.tokens.size * len(strategies)) as advance:
        found = evaluate_strategies(project.model, project.runtime, strategies, windows, advance, kv, prefill)
    yield quality_report(found)
    if curve and bank and bank.report:
        yield "\n" + curve_report(project, by, bank, windows, found[0].perplexity, kv)
    if prompts is not None:
        by.use_predictors(bank)  # type: ignore[arg-type]  # the curve had other thresholds
        yield "\n" + answers_report(project, strategies, prompts, answer_tokens)


def strategies_of(project: Project, by: Project | Proxies) -> tuple[list[Strategy], PredictorBank | ProxyBank | None]:
    """What is evaluated: dense, exact where that is something else, and what the bundle has artefacts for; of a model
    that fires sparsely, without any, learned, whose absence is then said. Copies of rows are taken into use. With them
    what names neurons, by its maker `by`, if it is there."""
    sparse = project.spec.fires_sparsely
    strategies: list[Strategy] = ["dense", "exact"] if sparse else ["dense"]
    if project.spec.certifiable and project.bundle.copies.is_file():
        project.folder.use_copies(project.model.ffns, project.bundle)
        strategies.append("certified")
    trained = project.bundle.predictors if sparse else project.bundle.proxy
    if not trained.is_file() and strategies != ["dense", "exact"]:
        return strategies, None
    return [*strategies, by.strategy], by.load_predictors()


def curve_report(
    project: Project,
    by: Project | Proxies,
    bank: PredictorBank | ProxyBank,
    windows: TokenWindows,
    dense: float,
    kv: KVChoice,
) -> str:
    """Perplexity along the curve in the report of `bank`; recall and precision are those of the report's validation
    text. by: what has the model use a bank. dense: perplexity."""
    points, strategies = bank.report.curve if bank.report else (), list[Strategy]([by.strategy])
    rows = []
    with progress("curve", windows.tokens.size * len(points)) as advance:
        for point in points:
            by.use_predictors(bank.with_thresholds(point.thresholds))  # type: ignore[arg-type]  # of the same kind
            quality = evaluate_strategies(project.model, project.runtime, strategies, windows, advance, kv)[-1]
            shares = _shares(point) if isinstance(bank, PredictorBank) else [percent(1 - quality.computed_share)]
            measured = [f"{quality.perplexity:.3f}", _change(quality.perplexity, dense)]
            rows.append([percent(quality.computed_share), *shares, *measured])
    return table(_PREDICTORS if isinstance(bank, PredictorBank) else _PROXIES, rows)


def _shares(point: CurvePoint) -> list[str]:
    ratio = f"{point.active_ratio:.2f}"
    return [ratio, percent(point.recall), percent(point.precision), f"{point.level:.2%}"]


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
