"""The proxy's kernel on the GPU, against its reference and the CPU's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, random_input, random_matrix

from cpu_kernels import proxy as on_cpu
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels.gemv import Tiling
from gpu_kernels.proxy import DeviceProxyView, name_passing, name_passing_ref, scores_ref


def make(d, f, activation="silu", gated=True, bias=False, kind="int4"):
    draw = torch.Generator().manual_seed(d + f)
    gate, up = (random_matrix(f, d, kind, seed) for seed in (1, 2))
    lengths = (torch.rand(f, generator=draw) + 0.1).to(DEVICE)
    biases = [torch.randn(f, generator=draw).to(DEVICE) if bias else None for _ in range(2)]
    if not gated:
        gate, biases[0] = None, None
    return DeviceProxyView(gate, up, lengths, 0.0, activation, *biases)


def with_threshold(view, x, share=0.6):
    """In the widest gap among the scores around a quantile, so that rounding moves none across."""
    ordered = scores_ref(view, x).flatten().sort().values
    near = ordered[max(0, int(share * len(ordered)) - 20) :][:40]
    widest = int(near.diff().argmax()) if len(near) > 1 else 0
    return replace(view, threshold=float(near[widest : widest + 2].mean()))


def named(view, x, tiling=None):
    masks = torch.full((view.up.shape[0],), -1, dtype=torch.int32, device=DEVICE)
    name_passing(view, x, masks, tiling)
    return masks


@pytest.mark.parametrize(
    ("tokens", "d", "f", "activation", "gated", "bias", "kind"),
    [
        (1, 1, 1, "silu", True, False, "int4"),
        (1, 300, 33, "silu", True, False, "int4"),
        (3, 129, 17, "gelu", True, True, "int8"),
        (8, 129, 13, "silu", True, False, "int4"),
        (32, 17, 5, "gelu_tanh", False, True, "int4"),
    ],
)
def test_equals_reference(tokens, d, f, activation, gated, bias, kind):
    x = random_input(tokens, d)
    view = with_threshold(make(d, f, activation, gated, bias, kind), x)
    expected = torch.full((f,), -1, dtype=torch.int32, device=DEVICE)
    name_passing_ref(view, x, expected)
    assert torch.equal(named(view, x), expected)
    assert f == 1 or 0 < int((expected & 1).sum()) < f


@pytest.mark.parametrize("tiling", [Tiling(1, 1, 1), Tiling(4, 2, 2)])
def test_other_tilings(tiling):
    x = random_input(2, 1100)
    view = with_threshold(make(1100, 9), x)
    assert torch.equal(named(view, x, tiling), named(view, x))


def test_a_token_has_the_same_bits_however_many_there_are():
    x = random_input(8, 40)
    view = with_threshold(make(40, 7), x)
    together = named(view, x)
    for t in (0, 5):
        assert torch.equal(named(view, x[t : t + 1]), (together >> t) & 1)


@pytest.mark.parametrize(("threshold", "mask"), [(float("inf"), 0), (0.0, 7)])
def test_none_and_all_pass(threshold, mask):
    assert named(replace(make(17, 9), threshold=threshold), random_input(3, 17)).tolist() == [mask] * 9


def test_agrees_with_the_cpu():
    x = random_input(1, 256)
    view = with_threshold(make(256, 30), x)
    gate, up = (Matrix(part.rows.cpu().numpy(), part.columns) for part in (view.gate, view.up))
    ours = on_cpu.ProxyView(gate, up, view.lengths.cpu().numpy(), np.float32(view.threshold), "silu")
    ids, _ = on_cpu.passing_of_tokens(ours, x.cpu().numpy(), WorkerPool(1))
    assert ids.tolist() == named(view, x).nonzero()[:, 0].tolist()


def test_refuses_what_does_not_fit():
    view = make(17, 33)
    masks = torch.zeros(33, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="1 to 4 tokens, or a multiple of 4 up to 32, got 10"):
        name_passing(view, random_input(10, 17), masks)
    with pytest.raises(ValueError, match=r"x \[t, 17\]"):
        name_passing(view, random_input(2, 18), masks)
    with pytest.raises(ValueError, match="int32 masks"):
        name_passing(view, random_input(2, 17), masks[:5])
    with pytest.raises(ValueError, match="rows are of int4 or int8, got bf16"):
        DeviceProxyView(None, random_matrix(3, 5, "bf16"), view.lengths[:3], 0.0, "silu")
    with pytest.raises(ValueError, match="lengths is"):
        replace(view, lengths=view.lengths[:2])
