"""Top-k and argmax against their references and torch: ties, NaN, infinities, any number of workers."""

import numpy as np
import pytest
import torch

from cpu_kernels.top_k import argmax, argmax_ref, top_k, top_k_merge, top_k_part, top_k_ref
from cpu_kernels.worker_pool import WorkerPool

SIZES = [1, 2, 17, 64, 65, 4095, 32000]


def random_logits(v, kind):
    rng = np.random.default_rng(v)
    logits = rng.standard_normal(v).astype(np.float32)
    orders = {"random": logits, "rising": np.sort(logits), "falling": -np.sort(logits), "ties": np.round(logits)}
    return orders[kind]


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "ties"])
def test_matches_reference(v, kind):
    logits, pool = random_logits(v, kind), WorkerPool(1)
    for k in sorted({1, min(v, 40), min(v, 4095)}):
        ids = top_k(logits, k, pool)
        assert ids.dtype == np.int32 and ids.tolist() == top_k_ref(logits, k, None).tolist()
    assert argmax(logits, pool) == argmax_ref(logits, None) == int(torch.from_numpy(logits).argmax())


def test_reference_is_torchs_stable_sort():
    logits = random_logits(100, "ties")
    expected = torch.from_numpy(logits).sort(descending=True, stable=True).indices
    assert top_k_ref(logits, 100, None).tolist() == expected.tolist()


def test_signs_infinities_and_nan():
    pool, inf = WorkerPool(1), np.inf
    logits = np.array([-0.0, 0.0, -1e-45, 1e-45, -inf, inf, -3e38, 3e38, -0.0], np.float32)
    assert top_k(logits, 9, pool).tolist() == [5, 7, 3, 0, 1, 8, 2, 6, 4]
    assert top_k(np.full(70, -inf, np.float32), 3, pool).tolist() == [0, 1, 2]
    for nan in (np.float32(np.nan), -np.float32(np.nan)):
        logits[[2, 6]] = nan
        assert top_k(logits, 4, pool).tolist() == top_k_ref(logits, 4, None).tolist() == [2, 6, 5, 7]
        assert argmax(logits, pool) == argmax_ref(logits, None) == 2


@pytest.mark.parametrize("kind", ["random", "rising", "ties"])
@pytest.mark.parametrize(("v", "k"), [(5, 5), (1000, 1), (1000, 300)])
def test_same_ids_for_any_number_of_workers(v, k, kind):
    """Also where a worker has fewer logits than are asked for, or none."""
    logits, pool = random_logits(v, kind), WorkerPool(7)
    for workers in (1, 2, 3, 7):
        heaps, ids = np.full((workers, k), 99, np.int64), np.empty(k, np.int32)
        pool.run(top_k_part, workers, logits, heaps)
        top_k_merge(heaps, ids)
        assert ids.tolist() == top_k_ref(logits, k, None).tolist()
    pool.close()


def test_misfits_are_refused():
    pool, logits = WorkerPool(1), np.zeros(5, np.float32)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k of 1 to 5, the number of logits, got {k}"):
            top_k(logits, k, pool)
    for bad in (logits.astype(np.float64), logits[None], logits[::2], logits.astype(np.int32)):
        with pytest.raises(ValueError, match="C-contiguous f32 logits of one axis"):
            top_k(bad, 1, pool)
    with pytest.raises(ValueError, match="got 1"):
        argmax(logits[:0], pool)
