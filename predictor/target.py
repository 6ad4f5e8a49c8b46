"""What quality is asked for of predictors, and at which price."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.common.errors import InputError


@dataclass(frozen=True)
class PredictorTarget:
    """What predictors may cost; checked when built.

    max_perplexity_increase: over dense, as a share (0.005 is 0.5%). max_active_ratio: neurons predicted over neurons
    that fire, whole model. max_bytes_share: of the model's bytes, all predictors together.
    """

    max_perplexity_increase: float = 0.005
    max_active_ratio: float = 2.0
    max_bytes_share: float = 0.08

    def __post_init__(self) -> None:
        if not 0 < self.max_perplexity_increase <= 1:
            raise InputError(
                f"target {self.max_perplexity_increase:.3%} is not above 0% and up to 100%; give one such as 0.5%"
            )
        if not self.max_active_ratio >= 1:
            raise InputError(f"the predicted-active ratio is {self.max_active_ratio}, expected at least 1")
        if not 0 < self.max_bytes_share <= 1:
            raise InputError(f"the predictors' share of bytes is {self.max_bytes_share}, expected 0 to 1")

    @classmethod
    def parse(cls, text: str) -> PredictorTarget:
        """A target from a perplexity increase in per cent, such as `0.5%`. Raises `InputError`."""
        try:
            percent = float(text.removesuffix("%")) if text.endswith("%") else float("nan")
        except ValueError:
            percent = float("nan")
        if percent != percent:
            raise InputError(f"target {text!r} is not a perplexity increase; give one in per cent, such as 0.5%")
        return cls(max_perplexity_increase=percent / 100)
