"""A bundle of random artefacts that fit a model and each other, made in milliseconds."""

from __future__ import annotations

import numpy as np
import torch

from hybrid.formats.bundle import Bundle
from placement.placement import Placement
from predictor.bank import PredictorBank
from predictor.low_rank import LowRankPredictor
from predictor.report import CurvePoint, PredictorReport, Quality
from profiler.common.spec import ModelSpec
from profiler.profile import NeuronProfile

TOKENS, SAMPLES = 400, 90


def random_profile(spec: ModelSpec, seed: int = 0) -> NeuronProfile:
    rng = np.random.default_rng(seed)
    return NeuronProfile(
        NeuronProfile.make_header(spec, {"corpus": "x", "corpus_files": ["x.txt"], "window": 16, "seed": seed}),
        rng.integers(0, TOKENS + 1, (spec.n_layers, spec.d_ff)),
        TOKENS,
        rng.standard_normal((spec.n_layers, SAMPLES, spec.d_model)).astype(np.float16),
        rng.integers(0, 9, SAMPLES).astype(np.int32),
        rng.integers(0, spec.vocab_size, (3, 16)).astype(np.int32),
    )


def random_predictor(spec: ModelSpec, rank: int, seed: int = 0) -> LowRankPredictor:
    g = torch.Generator().manual_seed(seed)
    fc1, fc2 = (
        torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)
        for shape in ((rank, spec.d_model), (spec.d_ff, rank))
    )
    scales = torch.rand(rank, generator=g) / 50, torch.rand(spec.d_ff, generator=g) / 50
    biases = torch.randn(rank, generator=g), torch.randn(spec.d_ff, generator=g)
    return LowRankPredictor(fc1, scales[0], biases[0], fc2, scales[1], biases[1], 0.25)


def report_of(bank: PredictorBank) -> PredictorReport:
    lines = [
        Quality(
            str(n), p.rank, p.nbytes, recall=0.9, precision=0.5, predicted_share=0.2, fired_share=0.1, missed_mass=0.01
        )
        for n, p in enumerate(bank.predictors)
    ]
    point = CurvePoint(0.01, bank.thresholds, recall=0.9, precision=0.5, predicted_share=0.2, active_ratio=2.0)
    return PredictorReport(tuple(lines), lines[0], (point,), tokens=TOKENS, level=0.01)


def random_bundle(bundle: Bundle, spec: ModelSpec) -> None:
    """Write profile, predictors and placement."""
    profile = random_profile(spec)
    profile.save(bundle.profile)
    bank = PredictorBank(tuple(random_predictor(spec, 3 + layer, layer) for layer in range(spec.n_layers)))
    target = {"max_perplexity_increase": 0.005, "max_active_ratio": 2.0, "max_bytes_share": 0.08}
    bank.save(bundle.predictors, spec, {"profile": profile.header.key, "target": target}, report_of(bank))
    Placement.random(spec, 0.3, seed=1).save(bundle.placement)
