"""`PredictorReport`: how good predictors are, per layer, overall, and along the curve of thresholds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from predictor.quality import Counts
from profiler.common.errors import ArtifactError


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

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer and a last one for all, for a table."""
        return [asdict(line) | {"active_ratio": line.active_ratio} for line in (*self.layers, self.overall)]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PredictorReport:
        """Read what `to_json` wrote. Raises `ArtifactError`."""
        try:
            fields = json.loads(text)
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
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"the predictors' report is unreadable ({error}); run: hybrid train") from error
