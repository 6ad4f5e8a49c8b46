"""`PredictorReport`: how good predictors are, per layer, overall, and along the curve of thresholds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from predictor.quality import Counts
from profiler.common.errors import ArtifactError, InputError
from profiler.common.tensor_file import parse_json


def _check_numbers(**values: Any) -> None:
    """Raise `InputError` for a value that is not a finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(f"the predictors' report has {name} {value!r:.40}, expected a finite number")


@dataclass(frozen=True)
class Quality:
    """One line of the report; shares are of all (token, neuron) pairs, missed_mass of the output mass."""

    layer: str
    rank: int
    bytes: int
    recall: float
    precision: float
    predicted_share: float
    fired_share: float
    missed_mass: float

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "layer"}
        _check_numbers(**numbers)
        if not isinstance(self.layer, str) or min(numbers.values()) < 0:
            raise InputError(f"the predictors' report has a line {self}, expected a layer's name and no number below 0")

    @classmethod
    def of(cls, layer: str, rank: int, size: int, counts: Counts) -> Quality:
        return cls(
            layer,
            rank,
            size,
            counts.recall,
            counts.precision,
            counts.predicted_share,
            counts.fired_share,
            counts.missed_mass,
        )

    @property
    def active_ratio(self) -> float:
        """Neurons predicted over neurons that fire."""
        return self.predicted_share / self.fired_share if self.fired_share else float(self.predicted_share > 0)


def overall_counts(layers: Sequence[Counts]) -> Counts:
    """Sums over layers, but each layer's output mass counts as 1, because layers differ in scale."""
    return Counts(
        pairs=sum(counts.pairs for counts in layers),
        predicted=sum(counts.predicted for counts in layers),
        fired=sum(counts.fired for counts in layers),
        hits=sum(counts.hits for counts in layers),
        mass=float(len(layers)),
        missed=sum(counts.missed_mass for counts in layers),
    )


@dataclass(frozen=True)
class CurvePoint:
    """The whole model at one level of missed output mass. `perplexity` is None until someone has measured it."""

    level: float
    thresholds: tuple[float, ...]
    recall: float
    precision: float
    predicted_share: float
    active_ratio: float
    perplexity: float | None = None

    def __post_init__(self) -> None:
        measured = {name: value for name, value in vars(self).items() if name not in ("thresholds", "perplexity")}
        _check_numbers(**measured, **{f"threshold of layer {n}": value for n, value in enumerate(self.thresholds)})
        if self.perplexity is not None:
            _check_numbers(perplexity=self.perplexity)


@dataclass(frozen=True)
class PredictorReport:
    """Quality on validation documents, at the thresholds chosen and along a curve of others.

    level: missed output mass that the thresholds allow per layer. perplexity_increase: over dense, as a share, or
    None where nothing measured it. shortfalls: one line for each part of the target that was not met.
    """

    layers: tuple[Quality, ...]
    overall: Quality
    curve: tuple[CurvePoint, ...]
    tokens: int
    level: float
    perplexity_increase: float | None = None
    shortfalls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        increase = 0.0 if self.perplexity_increase is None else self.perplexity_increase
        _check_numbers(tokens=self.tokens, level=self.level, perplexity_increase=increase)
        if not all(isinstance(line, str) for line in self.shortfalls):
            raise InputError(f"the predictors' report has shortfalls {self.shortfalls!r:.60}, expected lines of text")

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer and a last one for all, for a table."""
        return [asdict(line) | {"active_ratio": line.active_ratio} for line in (*self.layers, self.overall)]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PredictorReport:
        """Read what `to_json` wrote. Raises `ArtifactError`."""
        try:
            fields = parse_json(text)
            curve = tuple(CurvePoint(**point | {"thresholds": tuple(point["thresholds"])}) for point in fields["curve"])
            return cls(
                **fields
                | {
                    "layers": tuple(Quality(**line) for line in fields["layers"]),
                    "overall": Quality(**fields["overall"]),
                    "curve": curve,
                    "shortfalls": tuple(fields["shortfalls"]),
                }
            )
        except (ValueError, TypeError, KeyError, InputError) as error:
            raise ArtifactError(f"the predictors' report is unreadable ({error})") from error
