"""Residual sum and norms on the GPU: against the reference and torch's own norms."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DEVICE, assert_close, random_input

from gpu_kernels.norm import residual_norm, residual_norm_ref

EPS = 1e-5


def both(x, weight, bias, parts, wanted=True):
    """x and out after the kernel, and after the reference; both start from the same x."""
    found = x.clone(), torch.full_like(x, torch.nan)
    truth = x.clone(), torch.full_like(x, torch.nan)
    for function, (residual, out) in ((residual_norm, found), (residual_norm_ref, truth)):
        function(residual, weight, bias, EPS, out if wanted else None, parts)
    return found, truth


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("d", [1, 17, 300, 4095, 16384])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 7])
def test_matches_reference(tokens, d, layer, parts):
    weight, bias = random_input(2, d, seed=2)
    added = random_input(parts * tokens, d, seed=3).view(parts, tokens, d) if parts else None
    found, truth = both(random_input(tokens, d) + 2, weight, bias if layer else None, added)
    assert (found[0] == truth[0]).all(), "parts are added in order, in f32"
    assert_close(found[1], truth[1])


def test_is_torchs_norm():
    x, weight, bias = random_input(2, 129), *random_input(2, 129, seed=5)
    for given, expected in (
        (None, F.rms_norm(x, (129,), weight, EPS)),
        (bias, F.layer_norm(x, (129,), weight, bias, EPS)),
    ):
        out = torch.empty_like(x)
        residual_norm(x, weight, given, EPS, out)
        assert_close(out, expected)


def test_large_mean_and_tiny_values():
    weight, bias = random_input(2, 300, seed=2)
    for x in (random_input(1, 300) + 1000, random_input(1, 300) * 1e-6, torch.zeros(1, 300, device=DEVICE)):
        found, truth = both(x, weight, bias, None)
        assert_close(found[1], truth[1], 1e-4)


@pytest.mark.parametrize("parts", [0, 3])
def test_without_weights_it_is_the_sum(parts):
    x, added = random_input(2, 300), random_input(6, 300, seed=3).view(3, 2, 300)[:parts] if parts else None
    (residual, out), truth = both(x, None, None, added)
    assert (residual == truth[0]).all() and (out == truth[0]).all()


def test_columns_of_wider_rows_in_place():
    """As the heads of q and of k are, which have one norm."""
    wide, weight = random_input(3, 90), random_input(1, 40, seed=2)[0]
    before, expected = wide.clone(), F.rms_norm(wide[:, 20:60], (40,), weight, EPS)
    part = wide[:, 20:60]
    residual_norm(part, weight, None, EPS, part)
    assert_close(wide[:, 20:60], expected)
    assert (wide[:, :20] == before[:, :20]).all() and (wide[:, 60:] == before[:, 60:]).all()


def test_only_the_sum_and_in_place():
    x, parts, weight = random_input(2, 17), random_input(6, 17, seed=3).view(3, 2, 17), random_input(1, 17, seed=2)[0]
    (found, untouched), (truth, _) = both(x, None, None, parts, wanted=False)
    assert (found == truth).all() and untouched.isnan().all()
    residual_norm(found, weight, None, EPS, found)
    residual_norm_ref(truth, weight, None, EPS, truth)
    assert_close(found, truth)


def test_rejects_what_does_not_fit():
    x, weight = random_input(2, 17), random_input(1, 17)[0]
    out, parts = torch.empty_like(x), random_input(2, 17)[None]
    for wrong in (
        (x, weight[:16], None, EPS, out),
        (x, weight, weight[1:], EPS, out),
        (x, weight, None, EPS, out[:1]),
        (x, weight, None, EPS, None),
        (x, None, weight, EPS, out),
        (random_input(2, 19)[:, :17], weight, None, EPS, out),
        (x, weight, None, EPS, out, parts[:, :1]),
        (x.double(), weight, None, EPS, out),
        (random_input(17, 2).T, weight, None, EPS, out),
        (random_input(1, 16385), random_input(1, 16385)[0], None, EPS, random_input(1, 16385)),
    ):
        with pytest.raises(ValueError, match="residual_norm"):
            residual_norm(*wrong)
