"""What `hybrid bench` says of many rows in a step: how fast their union grows, and from when dense would be cheaper."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hybrid.bench.devices import known_firing, vram_plan
from hybrid.console import percent, table
from hybrid.runtime.engine import Engine
from placement.cost import CostModel
from placement.plan import Choice
from placement.rows import RowsTime, dense_from
from placement.workspace import BATCHES
from profiler.common.hardware import HardwareProfile

_CAPTION = (
    "A step of learned goes by its predictors in any company, as no answer may depend on what runs beside it: "
    "this shows where batching stops paying."
)


@dataclass(frozen=True)
class RowsResult:
    """Expected by the cost model for the machine `hardware`. dense_from: rows, None where learned stays cheaper."""

    hardware: str
    times: tuple[RowsTime, ...]
    dense_from: int | None

    @classmethod
    def of(cls, model: CostModel, choice: Choice) -> RowsResult:
        """By `model`, which is of `learned`."""
        times = tuple(RowsTime.of(model, choice, rows) for rows in BATCHES)
        return cls(model.hardware.name, times, dense_from(model, choice))

    def text(self) -> str:
        """A table with its caption."""
        rows = [
            [
                time.rows,
                percent(time.union_share),
                f"{1e6 * time.learned_seconds:,.1f}",
                f"{1e6 * time.dense_seconds:,.1f}",
                "dense" if time.dense_is_cheaper else "learned",
            ]
            for time in self.times
        ]
        header = ["rows of a step", "in the union", "learned, us", "dense, us", "cheaper"]
        most = self.times[-1].rows
        until = f"dense from {self.dense_from} rows on" if self.dense_from else f"learned up to {most} rows"
        return "\n".join(
            [
                f"FFN of a layer as expected for {self.hardware}; cheaper is {until}",
                table(header, rows),
                _CAPTION,
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """Types of JSON."""
        return asdict(self) | {"times": [asdict(time) for time in self.times]}


def rows_result(engine: Engine) -> RowsResult | None:
    """Of an engine that was loaded for `learned`; None where profile, predictors or a measured machine are missing."""
    plan, bundle = engine.plan, engine.plan.bundle
    if plan.strategy != "learned" or not (bundle.profile.is_file() and bundle.hardware.is_file()):
        return None
    hardware = HardwareProfile.load(bundle.hardware)
    if plan.gpu is not None and not hardware.has_gpu:
        return None
    firing = known_firing(bundle, plan.spec)
    if firing.frequency is None:
        return None
    choice = Choice.all_cpu(plan.spec.n_layers) if plan.gpu is None else engine.placement.choice
    hardware = hardware.with_threads(engine.runtime.pool.threads)
    return RowsResult.of(
        CostModel(vram_plan(engine), hardware, firing.frequency, "learned", firing.predicted_ratio), choice
    )
