"""Predictors without biases and thresholds, for engines that have neither: PowerInfer's fc1 and fc2.

    logits = fc2 relu(fc1 x) >= 0

x times any positive number gets the same answer, so x may as well be the residual that RMSNorm is yet to divide. What
biases did has to come from x itself. FFN inputs have a direction along which they are nearly all alike: the m that
makes m x closest to 1. So `b1` becomes `b1 m` in each row of fc1, and one hidden unit more, m, carries b2 less the
threshold. On SmolLM2's ReGLU sister m x is 1 within 2 to 7%, and what is predicted, with which recall, changes in the
third digit: no training is needed. Without the ridge m leans on elements that hardly vary, for int8 to lose.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import linear

from predictor.linear_start import covariance
from predictor.low_rank import LowRankPredictor, quantize_rows
from predictor.quality import Counts
from predictor.samples import FFNWeights, batches
from profiler.common.errors import InputError

_RIDGE = 0.01  # of the inputs' mean square; 0.001: 4% more predicted on that model; 0.1: another 1% on some layers


def constant_direction(inputs: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """m, f32 [d], of one layer's inputs [n, d], of which only `rows` are read: m x has mean 1 and varies least."""
    mean, moment = covariance(inputs, rows)
    moment += torch.outer(mean, mean)
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(1e-12)
    m = torch.linalg.solve(moment + ridge * torch.eye(len(mean), dtype=torch.float64), mean)
    return (m / (m @ mean).clamp_min(1e-12)).float()


def without_biases(predictor: LowRankPredictor, m: torch.Tensor) -> LowRankPredictor:
    """The same decision with biases and threshold of 0, from one hidden unit more: the last, along m."""
    fc1 = predictor.fc1.float() * predictor.fc1_scale[:, None] + predictor.b1[:, None] * m
    fc2 = predictor.fc2.float() * predictor.fc2_scale[:, None]
    last = predictor.b2 - predictor.threshold
    # A unit may be any positive number of times larger: of this size its weights are rounded no worse than the others.
    size = (last.abs().max() / fc2.abs().max().clamp_min(1e-30)).clamp_min(1e-30)
    q1, scale1 = quantize_rows(torch.cat([fc1, size * m[None]]))
    q2, scale2 = quantize_rows(torch.cat([fc2, last[:, None] / size], dim=1))
    return LowRankPredictor(q1, scale1, torch.zeros(len(q1)), q2, scale2, torch.zeros(len(q2)))


def of_residual(fc1: torch.Tensor, fc2: torch.Tensor, norm: torch.Tensor) -> LowRankPredictor:
    """PowerInfer's fc1 [r, d] and fc2 [f, r], which read the residual, as ours that reads what RMSNorm makes of it.

    norm: its weights, f32 [d]. Where one is 0 an element does not reach ours; raises `InputError` where fc1 reads it.
    Hidden units that do nothing are left out, such as those that only fill fc1 up.
    """
    if bool((fc1[:, norm == 0] != 0).any()):
        raise InputError("a predictor reads elements of the residual that the norm's weights of 0 take away")
    works = (fc1 != 0).any(dim=1) & (fc2 != 0).any(dim=0)
    works[0] |= not bool(works.any())
    folded = torch.where(norm == 0, 0.0, fc1[works] / norm)
    (q1, scale1), (q2, scale2) = quantize_rows(folded), quantize_rows(fc2[:, works])
    return LowRankPredictor(q1, scale1, torch.zeros(len(q1)), q2, scale2, torch.zeros(len(q2)))


def agreement(predictor: LowRankPredictor, fc1: torch.Tensor, fc2: torch.Tensor, norm: torch.Tensor) -> float:
    """The share of decisions in which what `of_residual` made agrees with fc1 and fc2, on 64 random residuals."""
    x = torch.randn(64, fc1.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = linear(linear(x, fc1).relu_(), fc2) >= 0
    normed = x / x.square().mean(dim=1, keepdim=True).sqrt() * norm
    return float((predictor.mask(normed) == wanted).float().mean())


def counted(predictor: LowRankPredictor, weights: FFNWeights, inputs: np.ndarray, rows: np.ndarray) -> Counts:
    """What a predictor gets right on `rows` of one layer's inputs [n, d]; weights are f32."""
    totals = torch.zeros(4, dtype=torch.int64)
    masses = torch.zeros(2, dtype=torch.float64)
    for x in batches(inputs, rows):
        fired, mass = weights.fired_and_mass(x)
        predicted = predictor.mask(x)
        totals += torch.tensor([fired.numel(), predicted.sum(), fired.sum(), (predicted & fired).sum()])
        masses += torch.tensor([mass.sum(dtype=torch.float64), mass[~predicted].sum(dtype=torch.float64)])
    return Counts(*totals.tolist(), *masses.tolist())
