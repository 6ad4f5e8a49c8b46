"""`LowRankPredictor`: one layer's low-rank MLP that says which neurons will fire.

    logits = fc2 relu(fc1 x + b1) + b2,   neuron i is predicted to fire where logits[i] >= threshold

The form is that of Deja Vu (ICML'23) and PowerInfer (SOSP'24). Weights are int8 with one f32 scale per row: at equal
bytes that is twice the rank of bf16, and rank decides the quality. On the embedded model, at 8% of its bytes and 1% of
missed output mass, bf16 had to predict 2.9 times the neurons that fire, int8 1.5 times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from profiler.common.errors import InputError

_INT8_MAX = 127


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [n, m] and f32 scales [n] with weight[i] close to scale[i] * int8[i]."""
    scale = (weight.abs().amax(dim=1) / _INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().to(torch.int8), scale


@dataclass(frozen=True, eq=False)
class LowRankPredictor:
    """fc1: int8 [r, d], fc1_scale and b1: f32 [r]; fc2: int8 [f, r], fc2_scale and b2: f32 [f]; threshold on the logit.

    x is the input of the layer's FFN, after the norm before it. Raises `InputError` for other shapes and types, and for
    scales, biases or a threshold that are not finite: with those it would predict nothing, or everything, silently.
    """

    fc1: torch.Tensor
    fc1_scale: torch.Tensor
    b1: torch.Tensor
    fc2: torch.Tensor
    fc2_scale: torch.Tensor
    b2: torch.Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        rank, f, d = self.b1.numel(), self.b2.numel(), self.fc1.shape[-1]
        shapes = {"fc1": (rank, d), "fc1_scale": (rank,), "b1": (rank,)}
        shapes |= {"fc2": (f, rank), "fc2_scale": (f,), "b2": (f,)}
        for name, shape in shapes.items():
            part, dtype = getattr(self, name), torch.int8 if name in ("fc1", "fc2") else torch.float32
            if part.shape != shape or part.dtype != dtype:
                raise InputError(f"a predictor's {name} is {part.dtype} {list(part.shape)}, expected {dtype} {shape}")
            if dtype == torch.float32 and not part.isfinite().all():
                raise InputError(f"a predictor's {name} has values that are not finite")
        if rank < 1:
            raise InputError("a predictor has rank 0, expected at least 1")
        if not abs(self.threshold) <= torch.finfo(torch.float32).max:
            raise InputError(f"a predictor's threshold is {self.threshold}, expected a finite number")

    @classmethod
    def quantized(
        cls, fc1: torch.Tensor, b1: torch.Tensor, fc2: torch.Tensor, b2: torch.Tensor, x: torch.Tensor
    ) -> LowRankPredictor:
        """Round an f32 MLP, and shift the biases so that its hidden units and logits keep their means over x [t, d]."""
        mean = x.mean(dim=0)
        q1, scale1 = quantize_rows(fc1)
        rounded_b1 = b1 + fc1 @ mean - (q1.float() @ mean) * scale1
        hidden_mean = linear(x, fc1, b1).relu_().mean(dim=0)
        rounded_mean = (linear(x, q1.float()) * scale1 + rounded_b1).relu_().mean(dim=0)
        q2, scale2 = quantize_rows(fc2)
        rounded_b2 = b2 + fc2 @ hidden_mean - (q2.float() @ rounded_mean) * scale2
        return cls(q1, scale1, rounded_b1, q2, scale2, rounded_b2)

    @property
    def rank(self) -> int:
        return len(self.b1)

    @property
    def nbytes(self) -> int:
        """Bytes stored and read: the int8 weights, and a scale and a bias per row."""
        return predictor_bytes(self.fc1.shape[1], len(self.b2), self.rank)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x: f32 [t, d]; returns f32 [t, f]."""
        hidden = linear(x, self.fc1.float()).mul_(self.fc1_scale).add_(self.b1).relu_()
        return linear(hidden, self.fc2.float()).mul_(self.fc2_scale).add_(self.b2)

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """x: f32 [t, d]; returns bool [t, f], the neurons predicted to fire."""
        return self.logits(x) >= self.threshold

    def with_threshold(self, threshold: float) -> LowRankPredictor:
        """The same predictor deciding at another logit; the weights are shared."""
        return replace(self, threshold=threshold)

    def reordered(self, order: torch.Tensor) -> LowRankPredictor:
        """The predictor of the same layer with its neurons permuted: new neuron i is old neuron order[i]."""
        return replace(self, fc2=self.fc2[order], fc2_scale=self.fc2_scale[order], b2=self.b2[order])


def predictor_bytes(d_model: int, d_ff: int, rank: int) -> int:
    """Bytes of a predictor of `rank`; its threshold is one f32 more."""
    return rank * (d_model + d_ff) + 8 * (rank + d_ff) + 4
