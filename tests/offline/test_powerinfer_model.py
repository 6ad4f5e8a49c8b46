"""A model under PowerInfer's names, and what is not one of its models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from predictor_cases import SPEC

from hybrid.errors import InputError
from hybrid.offline.powerinfer_model import architecture_of, fold, padded
from predictor.low_rank import LowRankPredictor
from profiler.common.spec import RopeSpec

LLAMA = replace(SPEC, d_model=64, head_dim=32)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"activation": "silu"}, "activation"),
        ({"activation": "relu2"}, "activation"),
        ({"gated": False}, "gated"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"ffn_bias": True}, "ffn_bias"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"norms": "both"}, "norms"),
        ({"logit_cap": 15.0}, "logit_cap"),
        ({"rope": RopeSpec(kind="llama3")}, "rope"),
        ({"rope": RopeSpec(turned=16)}, "rope"),
        ({"rope": None}, "rope"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_what_powerinfer_does_not_compute_is_refused_by_name(changes, field):
    with pytest.raises(InputError, match=rf"this llama model with \w+ differs in {field}, and stays with hybrid"):
        architecture_of(replace(LLAMA, **changes))


def test_architectures_are_told_apart_by_the_activation():
    assert architecture_of(LLAMA) == "llama"
    assert architecture_of(replace(LLAMA, activation="drelu", family="bamboo", sliding_window=9)) == "bamboo"
    assert architecture_of(replace(LLAMA, rope=RopeSpec(5e5, "linear", 2.0), tied=True)) == "llama"


def test_a_width_that_its_kernels_read_beyond_is_refused():
    with pytest.raises(InputError, match="want a width that 64 divides, this model's is 96"):
        architecture_of(replace(LLAMA, d_model=96, head_dim=48))


def test_padding_is_of_zeros_behind():
    found = padded(np.ones((2, 300)), 1)
    assert found.shape == (2, 512) and found.sum() == 600 and not found[:, 300:].any()
    assert padded(np.ones((256, 3)), 0).shape == (256, 3)


@pytest.mark.parametrize("length", [1.0, 300.0])
def test_a_folded_predictor_reads_the_residual(length):
    """What the norm makes of a residual, read by ours, and the residual, read by fc1 and fc2, name the same neurons."""
    g = torch.Generator().manual_seed(0)
    d, f, rank = 64, 37, 9
    fc1, fc2 = (torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in ((rank, d), (f, rank)))
    fc1[-1] = 127  # the unit that is nearly constant: the mean of all elements
    zero, one = torch.zeros, torch.ones
    ours = LowRankPredictor(fc1, one(rank) / 50, zero(rank), fc2, torch.rand(f, generator=g), zero(f))
    norm = 0.5 + torch.rand(d, generator=g)
    residual = length * (torch.randn(200, d, generator=g) + 1)
    normed = residual / residual.square().mean(dim=1, keepdim=True).sqrt() * norm
    first, second = fold(ours, norm, normed)
    assert first.shape == (64, d) and second.shape == (256, 64)
    assert 0.5 < np.abs(normed.numpy() @ (first[:rank] / norm.numpy()).T).max() <= 1
    halves = [torch.from_numpy(part.astype(np.float16)).float() for part in (first, second)]
    found = (residual @ halves[0].T).relu() @ halves[1].T >= 0
    assert 0.2 < ours.mask(normed).float().mean() < 0.8
    assert float((found[:, :f] == ours.mask(normed)).float().mean()) > 0.998
    assert not found[:, f:].any()


def test_folding_keeps_int8_weights_to_be_found_again():
    g = torch.Generator().manual_seed(1)
    fc1 = torch.randint(-127, 128, (5, 64), generator=g, dtype=torch.int8)
    zero, one = torch.zeros, torch.ones
    ours = LowRankPredictor(fc1, torch.rand(5, generator=g) / 9, zero(5), one(3, 5).to(torch.int8), one(3), zero(3))
    norm = 0.1 + torch.rand(64, generator=g)
    first, _ = fold(ours, norm, torch.randn(9, 64, generator=g))
    rows = torch.from_numpy(first.astype(np.float16)).float()[:5] / norm
    scale = rows.abs().amax(dim=1, keepdim=True) / fc1.abs().amax(dim=1, keepdim=True)
    assert torch.equal((rows / scale).round().to(torch.int8), fc1)
