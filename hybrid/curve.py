"""Perplexity along the thresholds of predictors or proxies: the table of `hybrid eval --curve`."""

from __future__ import annotations

from hybrid.console import percent, progress, table
from hybrid.offline.evaluate import evaluate
from hybrid.offline.project import Project
from hybrid.offline.proxies import Proxies
from hybrid.reports import change
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.report import CurvePoint
from profiler.common.spec import KVChoice, Strategy
from profiler.corpus import TokenWindows

_PREDICTORS = ["predicted", "of those firing", "recall", "precision", "missed mass", "perplexity", "vs dense"]
_PROXIES = ["computed", "left out", "perplexity", "vs dense"]


def curve(
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
            quality = evaluate(project.model, project.runtime, strategies, windows, advance, kv)[-1]
            shares = _shares(point) if isinstance(bank, PredictorBank) else [percent(1 - quality.computed_share)]
            measured = [f"{quality.perplexity:.3f}", change(quality.perplexity, dense)]
            rows.append([percent(quality.computed_share), *shares, *measured])
    return table(_PREDICTORS if isinstance(bank, PredictorBank) else _PROXIES, rows)


def _shares(point: CurvePoint) -> list[str]:
    ratio = f"{point.active_ratio:.2f}"
    return [ratio, percent(point.recall), percent(point.precision), f"{point.level:.2%}"]
