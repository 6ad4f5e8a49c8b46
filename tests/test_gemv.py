"""GEMV against its reference: awkward shapes, every stored type, with and without bias, any number of workers."""

import numpy as np
import pytest
import torch

from cpu_kernels.gemv import gemv, gemv_ref
from cpu_kernels.lanes import kernel_view, widen_ref
from cpu_kernels.worker_pool import WorkerPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (64, 384), (129, 4095)])
@pytest.mark.parametrize("biased", [False, True])
def test_matches_reference(rows, width, dtype, biased):
    generator = torch.Generator().manual_seed(rows * width)
    weight = kernel_view(torch.randn(rows, width, generator=generator).to(dtype))
    x = torch.randn(width, generator=generator).numpy()
    bias = torch.randn(rows if biased else 0, generator=generator).numpy()
    ours, truth = np.full(rows, np.nan, np.float32), np.full(rows, np.nan, np.float32)
    gemv(weight, x, bias, ours, WorkerPool(1))
    gemv_ref(weight, x, bias, truth, None)
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5 * width**0.5)


def test_same_bits_for_any_number_of_workers():
    generator = torch.Generator().manual_seed(0)
    weight = kernel_view(torch.randn(1001, 2048, generator=generator).bfloat16())
    x = torch.randn(2048, generator=generator).numpy()
    answers = []
    for threads in (1, 2, 3):
        pool = WorkerPool(threads)
        answers.append(np.empty(1001, np.float32))
        gemv(weight, x, np.empty(0, np.float32), answers[-1], pool)
        pool.close()
    assert pool.workers_for(weight.nbytes) == 1 and WorkerPool(3).workers_for(weight.nbytes) == 3
    assert (answers[0] == answers[1]).all() and (answers[0] == answers[2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_exact_for_every_finite_value(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = (
        bits.view(dtype) if dtype != torch.float32 else torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    )
    weight = weight[weight.isfinite()][:, None].contiguous()
    out = np.empty(len(weight), np.float32)
    gemv(kernel_view(weight), np.ones(1, np.float32), np.empty(0, np.float32), out, WorkerPool(1))
    assert (out == weight[:, 0].float().numpy()).all()
    assert (widen_ref(kernel_view(weight))[:, 0] == out).all()


def test_misfits_are_refused():
    pool, weight = WorkerPool(1), np.zeros((2, 3), np.float32)
    empty, out = np.empty(0, np.float32), np.empty(2, np.float32)
    with pytest.raises(ValueError, match="shapes do not fit"):
        gemv(weight, np.zeros(4, np.float32), empty, out, pool)
    with pytest.raises(ValueError, match="f32"):
        gemv(weight, np.zeros(3), empty, out, pool)
    with pytest.raises(ValueError, match="contiguous"):
        kernel_view(torch.zeros(3, 2).T)
    with pytest.raises(TypeError, match="float64"):
        kernel_view(torch.zeros(2, dtype=torch.float64))
