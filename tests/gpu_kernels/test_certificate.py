"""Certificates on the GPU: against their reference, and never less careful than the bound."""

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, random_input

from cpu_kernels.error_bound import bounded_copy
from gpu_kernels.certificate import DeviceCertificateView, certify, certify_ref
from gpu_kernels.matrix import DeviceMatrix


def certificate(weight: np.ndarray, bias: torch.Tensor | None = None, threshold: float = 0.0) -> DeviceCertificateView:
    rows, slope, rest = bounded_copy(weight)
    matrix = DeviceMatrix(torch.from_numpy(rows.view(np.uint8)).to(DEVICE), weight.shape[1], "int8")
    bounds = (torch.from_numpy(part).to(DEVICE) for part in (slope, rest))
    return DeviceCertificateView(matrix, *bounds, bias, threshold)


def named(view: DeviceCertificateView, x: torch.Tensor) -> torch.Tensor:
    masks = torch.full((view.rows.shape[0],), -1, dtype=torch.int32, device=DEVICE)
    certify(view, x, masks)
    return masks


@pytest.mark.parametrize(
    ("tokens", "d", "f", "threshold"),
    [(1, 1, 1, 0.0), (1, 129, 37, 0.0), (1, 2500, 9, 0.02), (3, 40, 17, 0.0), (8, 129, 13, 0.5), (32, 33, 5, 0.0)],
)
def test_equals_reference(tokens, d, f, threshold):
    random = np.random.default_rng(d)
    weight = (random.standard_normal((f, d)) / d**0.5).astype(np.float32)
    bias = None if f == 37 else torch.from_numpy(random.standard_normal(f).astype(np.float32) - 0.5).to(DEVICE)
    view, x = certificate(weight, bias, threshold), random_input(tokens, d)
    found, expected = named(view, x), torch.zeros(f, dtype=torch.int32, device=DEVICE)
    certify_ref(view, x, expected)
    # Right at the bound rounding may name one more, and no seed here has such a neuron.
    assert torch.equal(found, expected)
    fires = (x.cpu().double() @ torch.from_numpy(weight).double().T + (0 if bias is None else bias.cpu())) > threshold
    assert f < 9 or int(fires.sum()) > 0
    bits = (found.cpu()[None, :] >> torch.arange(tokens)[:, None]) & 1
    assert (bits.bool() | ~fires).all()


def test_inputs_that_are_no_numbers_or_overflow_name_every_neuron():
    view = certificate(np.full((5, 64), -1, np.float32))
    for value in (float("nan"), float("inf"), 3e38):
        x = torch.ones(1, 64, device=DEVICE)
        x[0, 3] = value
        assert (named(view, x) == 1).all()
    assert (named(view, torch.ones(1, 64, device=DEVICE)) == 0).all()


def test_what_does_not_fit_is_refused():
    view = certificate(np.ones((5, 64), np.float32))
    masks = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    for x, out, message in (
        (random_input(5, 64), masks, "multiple of 4"),
        (random_input(1, 63), masks, "f32 x"),
        (random_input(1, 64), masks[:4], "masks of 5"),
    ):
        with pytest.raises(ValueError, match=message):
            certify(view, x, out)
    with pytest.raises(ValueError, match="slope"):
        DeviceCertificateView(view.rows, view.slope[:2], view.rest, None, 0.0)
