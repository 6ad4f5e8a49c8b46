"""RMSNorm and LayerNorm against their references and torch: awkward shapes, in place, any number of workers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cpu_kernels.norm import layer_norm, layer_norm_ref, layer_norm_rows, rms_norm, rms_norm_ref, rms_norm_rows
from cpu_kernels.worker_pool import WorkerPool

EPS = 1e-5
SHAPES = [(1, 1), (1, 17), (1, 64), (3, 17), (2, 4095), (7, 128)]


def inputs(tokens, d, shift=0.0):
    rng = np.random.default_rng(tokens * d)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, d), d, d))
    return x + np.float32(shift), weight, bias


def blank(x):
    return np.full_like(x, np.nan)


@pytest.mark.parametrize(("tokens", "d"), SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_rms_norm_matches_reference(tokens, d, scale):
    x, weight, _ = inputs(tokens, d)
    x *= np.float32(scale)
    ours, truth = blank(x), blank(x)
    rms_norm(x, weight, EPS, ours, WorkerPool(1))
    rms_norm_ref(x, weight, EPS, truth, None)
    np.testing.assert_allclose(ours, truth, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "d"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_layer_norm_matches_reference(tokens, d, shift):
    x, weight, bias = inputs(tokens, d, shift)
    ours, truth = blank(x), blank(x)
    layer_norm(x, weight, bias, EPS, ours, WorkerPool(1))
    layer_norm_ref(x, weight, bias, EPS, truth, None)
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=2e-6 * (1 + shift))


def test_references_are_torchs_norms():
    x, weight, bias = inputs(3, 17)
    ours = blank(x)
    wide, *parameters = (torch.from_numpy(a).double() for a in (x, weight, bias))
    rms_norm_ref(x, weight, EPS, ours, None)
    np.testing.assert_allclose(ours, F.rms_norm(wide, (17,), parameters[0], EPS), rtol=1e-6, atol=1e-7)
    layer_norm_ref(x, weight, bias, EPS, ours, None)
    np.testing.assert_allclose(ours, F.layer_norm(wide, (17,), *parameters, EPS), rtol=1e-6, atol=1e-7)


def test_in_place_and_a_row_of_zeros():
    x, weight, bias = inputs(2, 33)
    x[1] = 0
    for norm, parameters in ((rms_norm, (weight,)), (layer_norm, (weight, bias))):
        apart, here = blank(x), x.copy()
        norm(x, *parameters, EPS, apart, WorkerPool(1))
        norm(here, *parameters, EPS, here, WorkerPool(1))
        assert (here == apart).all()
        assert (apart[1] == (bias if len(parameters) == 2 else 0)).all()


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_same_bits_for_any_number_of_workers_and_alone(tokens):
    x, weight, bias = inputs(tokens, 257)
    pool = WorkerPool(7)
    for rows, norm, parameters in ((rms_norm_rows, rms_norm, (weight,)), (layer_norm_rows, layer_norm, (weight, bias))):
        alone = np.concatenate([blank(x[:1]) for _ in range(tokens)])
        for t in range(tokens):
            norm(x[t : t + 1], *parameters, EPS, alone[t : t + 1], pool)
        for workers in (1, 2, 3, 7):
            together = blank(x)
            pool.run(rows, workers, x, *parameters, EPS, together)
            assert (together == alone).all()
    pool.close()


def test_misfits_are_refused():
    x, weight, bias = inputs(2, 6)
    pool = WorkerPool(1)
    with pytest.raises(ValueError, match="rms_norm shapes do not fit"):
        rms_norm(x, weight[:5], EPS, blank(x), pool)
    with pytest.raises(ValueError, match="layer_norm shapes do not fit"):
        layer_norm(x, weight, bias, EPS, blank(x[:1]), pool)
    with pytest.raises(ValueError, match="layer_norm shapes do not fit"):
        layer_norm(x, weight, bias[:5], EPS, blank(x), pool)
    with pytest.raises(ValueError, match="shapes do not fit"):
        rms_norm(x[0], weight, EPS, blank(x[0]), pool)
    with pytest.raises(ValueError, match="f32"):
        rms_norm(x.astype(np.float64), weight, EPS, blank(x), pool)
    with pytest.raises(ValueError, match="C-contiguous"):
        rms_norm(np.asfortranarray(x), weight, EPS, blank(x), pool)
