"""Certificates on the CPU: a neuron that is not named is silent in f32, whatever is done to break the bound."""

import numpy as np
import pytest
import torch

from cpu_kernels.blocks import dequantize
from cpu_kernels.certificate import CertificateView, name_tokens, name_tokens_ref
from cpu_kernels.error_bound import bounded_copy
from cpu_kernels.gemv import gemv
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@pytest.fixture(scope="module")
def pool():
    made = WorkerPool(2)
    yield made
    made.close()


def certificate(weight, bias=None, activation="relu"):
    bias = np.zeros(0, np.float32) if bias is None else bias
    return CertificateView(*bounded_copy(weight), bias, activation, weight.shape[1])


def named(view, x, pool):
    """bool [t, f]."""
    ids, offsets = name_tokens(view, x, pool)
    found = np.zeros((len(x), len(view.rows)), bool)
    for token, row in enumerate(found):
        mine = ids[offsets[token] : offsets[token + 1]]
        assert (np.diff(mine) > 0).all()
        row[mine] = True
    return found


def fires(matrix, x, bias, threshold, pool):
    """What `exact` finds, by the kernel that it uses."""
    out = np.zeros((len(x), matrix.shape[0]), np.float32)
    for token, row in enumerate(out):
        gemv(matrix, x[token : token + 1], np.zeros(0, np.float32) if bias is None else bias, row[None], pool)
    with np.errstate(invalid="ignore"):
        return ~(out <= threshold)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("d", "f", "biased", "activation"),
    [(1, 1, False, "relu"), (17, 301, True, "relu2"), (129, 40, True, "fatrelu_0.5"), (2048, 300, False, "drelu")],
)
def test_what_is_not_named_is_silent(d, f, biased, activation, kind, pool):
    random = np.random.default_rng(d)
    stored = (torch.from_numpy(random.standard_normal((f, d))) / d**0.5).to(TYPES[kind])
    bias = random.standard_normal(f).astype(np.float32) if biased else None
    view, x = certificate(stored.float().numpy(), bias, activation), random.standard_normal((9, d)).astype(np.float32)
    x[1], x[2], x[3] = 0, x[2] * 1e-20, x[3] * np.exp(3 * random.standard_normal(d))
    found = named(view, x, pool)
    fired = fires(Matrix.of(stored), x, bias, view.threshold, pool)
    assert (found | ~fired).all()
    np.testing.assert_array_equal(found & name_tokens_ref(view, x), name_tokens_ref(view, x))
    # The reference's bounds are of f64; what the kernel adds is far less than a hundredth of them but for tiny inputs.
    more = found & ~name_tokens_ref(view, x, 0.01)
    assert not np.delete(more, [1, 2], axis=0).any()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("d", [16, 33, 300, 4096])
def test_inputs_along_the_error_do_not_get_past_it(d, kind, pool):
    """For each row the input that its error gains most of, pushed down along the row until the copy's product is as far
    below 0 as the error is above: z is near 0 on either side of it, and each must be named that is not below."""
    random = np.random.default_rng(d)
    stored = (torch.from_numpy(random.standard_normal((64, d))) * 0.02).to(TYPES[kind])
    weight = stored.float().numpy().astype(np.float64)
    view = certificate(stored.float().numpy())
    error = weight - dequantize(view.rows, d)
    inputs = []
    for i in range(64):
        along = np.sign(error[i]) if i % 2 else error[i] / np.abs(error[i]).max()
        for step in (-1e-6, 0.0, 1e-6, 1e-4):
            down = weight[i] * ((weight[i] @ along) * (1 - step) / (weight[i] @ weight[i]))
            inputs.append(along - down)
    x = np.array(inputs).astype(np.float32)
    found, fired = named(view, x, pool), fires(Matrix.of(stored), x, None, 0, pool)
    assert (found | ~fired).all()
    own = np.repeat(np.arange(64), 4)
    assert 0.2 < fired[np.arange(len(x)), own].mean() < 0.8, "inputs lie on both sides of the threshold"


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e-7, 1.0, 4e4])
def test_numbers_at_the_ends_of_f32(scale, pool):
    """Weights and inputs whose products are denormal, vanish or overflow; blocks of zeros; and no numbers at all."""
    random = np.random.default_rng(7)
    weight = np.clip(random.standard_normal((48, 100)) * scale, -65504, 65504).astype(np.float32)
    weight[5], weight[6, :64] = 0, 0
    matrix, view = Matrix.of(torch.from_numpy(weight)), certificate(weight)
    sizes = [1e-45, 1e-38, 1e-30, 1e-19, 1e-7, 1.0, 1e10, 1e19, 1e30, 1e36, 3e38]
    x = np.array([np.clip(random.standard_normal(100) * size, -3e38, 3e38) for size in sizes]).astype(np.float32)
    x = np.concatenate((x, x[5:7], x[5:7]))
    x[-4, 3], x[-3, 3], x[-2, 3], x[-1, 3] = np.nan, np.inf, -np.inf, 3e38
    with np.errstate(all="ignore"):
        found, fired = named(view, x, pool), fires(matrix, x, None, 0, pool)
    assert (found | ~fired).all()
    assert found[-4:-1].all()


def test_most_silent_neurons_of_a_real_shape_are_not_named(pool):
    """10% firing at d=2048: 15% named, so that a certificate is worth its bytes."""
    random = np.random.default_rng(0)
    weight = torch.from_numpy(random.standard_normal((400, 2048)) / 2048**0.5).bfloat16().float().numpy()
    view = certificate(weight, np.full(400, -1.28, np.float32))
    x = random.standard_normal((30, 2048)).astype(np.float32)
    assert 0.1 < named(view, x, pool).mean() < 0.18


def test_misfits_are_refused(pool):
    view = certificate(np.ones((3, 40), np.float32))
    with pytest.raises(ValueError, match="40 columns"):
        name_tokens(view, np.ones((1, 41), np.float32), pool)
    with pytest.raises(ValueError, match="slope"):
        CertificateView(view.rows, view.slope[:2], view.rest, view.bias, "relu", 40)
