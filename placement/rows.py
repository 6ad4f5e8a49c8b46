"""Rows of a step: what the union of their neurons costs beside computing every neuron, by the cost model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpu_kernels.contract import MAX_BATCH
from placement.cost import CostModel
from placement.plan import Choice


@dataclass(frozen=True)
class RowsTime:
    """A step of `rows` rows. union_share: of the neurons, those that are predicted for some row, expected. Seconds of a
    layer's FFN, on the mean: `learned` with its predictor, and `dense`."""

    rows: int
    union_share: float
    learned_seconds: float
    dense_seconds: float

    @classmethod
    def of(cls, model: CostModel, choice: Choice, rows: int) -> RowsTime:
        """By `model`, which is of `learned`, with the neurons of `choice` on the GPU."""
        learned = replace(model, rows=rows)
        plan = replace(model.plan, predictor_bytes=(0,) * model.plan.spec.n_layers)
        dense = replace(learned, plan=plan, strategy="dense")
        return cls(rows, learned.union_share, learned.ffn_seconds(choice), dense.ffn_seconds(choice))

    @property
    def dense_is_cheaper(self) -> bool:
        return self.dense_seconds < self.learned_seconds


def dense_from(model: CostModel, choice: Choice) -> int | None:
    """The number of rows from which on every step is cheaper computed densely, None where that of the most is not."""
    found = None
    for rows in range(MAX_BATCH, 0, -1):
        if not RowsTime.of(model, choice, rows).dense_is_cheaper:
            break
        found = rows
    return found
