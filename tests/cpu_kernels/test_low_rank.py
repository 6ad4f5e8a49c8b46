"""The low-rank predictor kernels against their reference: one token, many, any number of workers."""

import numpy as np
import pytest
import torch
from matrix_cases import THREADS

from cpu_kernels.low_rank import PredictorView, pad_codes, predict_rows, predict_rows_ref, predict_tokens
from cpu_kernels.worker_pool import WorkerPool


def make(d, r, f, threshold=0.0, tokens=1):
    g = torch.Generator().manual_seed(d + r + f)
    fc1, fc2 = (torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in ((r, d), (f, r)))
    s1, s2 = torch.rand(r, generator=g) / 100, torch.rand(f, generator=g) / 100
    b1, b2 = torch.randn(r, generator=g), torch.randn(f, generator=g)
    return PredictorView.of(fc1, s1, b1, fc2, s2, b2, threshold), torch.randn(tokens, d, generator=g).numpy()


@pytest.mark.parametrize(("d", "r", "f"), [(1, 1, 1), (17, 3, 65), (384, 96, 1537), (1023, 129, 300)])
@pytest.mark.parametrize("threshold", [-1e9, 0.0, 0.7, 1e9])
def test_matches_reference(d, r, f, threshold):
    view, x = make(d, r, f, threshold)
    ours, truth = np.full((2, f), -1, np.int32)
    count = predict_rows(view, x[0], ours, WorkerPool(1))
    assert count == predict_rows_ref(view, x[0], truth, None)
    assert ours.tolist() == truth.tolist()
    assert count == {-1e9: f, 1e9: 0}.get(threshold, count)


def test_same_ids_for_any_number_of_workers(monkeypatch):
    monkeypatch.setattr("cpu_kernels.worker_pool.BYTES_PER_WORKER", 1)
    view, x = make(333, 129, 1001)
    found = []
    for threads in THREADS:
        pool, rows = WorkerPool(threads), np.zeros(1001, np.int32)
        found.append((predict_rows(view, x[0], rows, pool), rows.tolist()))
        pool.close()
    assert found == found[:1] * len(THREADS) and 0 < found[0][0] < 1001


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_many_tokens_are_each_as_one(tokens, threads):
    view, x = make(49, 17, 85, 0.3, tokens)
    pool = WorkerPool(threads)
    ids, offsets = predict_tokens(view, x, pool)
    assert ids.dtype == np.int32 and offsets.dtype == np.int64 and offsets.shape == (tokens + 1,)
    for t in range(tokens):
        rows = np.empty(85, np.int32)
        count = predict_rows(view, x[t], rows, pool)
        assert ids[offsets[t] : offsets[t + 1]].tolist() == rows[:count].tolist()
    pool.close()


def test_codes_are_padded_to_whole_groups_and_kept_where_they_fit():
    codes = np.arange(-6, 6, dtype=np.int8).reshape(2, 6)
    wide = pad_codes(codes)
    assert wide.shape == (2, 128) and (wide[:, :6] == codes).all() and not wide[:, 6:].any()
    assert pad_codes(wide) is not codes and np.shares_memory(pad_codes(wide), wide)


def test_bytes_that_a_prediction_reads():
    view, _ = make(17, 3, 65)
    assert view.nbytes == (3 + 65) * (128 + 8)


def test_misfits_are_refused():
    view, x = make(5, 2, 3)
    pool = WorkerPool(1)
    with pytest.raises(ValueError, match="wants f32 x of 5"):
        predict_rows(view, x[0, :4], np.zeros(3, np.int32), pool)
    with pytest.raises(ValueError, match="wants f32 x of 5 columns"):
        predict_tokens(view, x.astype(np.float64), pool)
    with pytest.raises(ValueError, match="wants int32 rows of 3"):
        predict_rows(view, x[0], np.zeros(3, np.int64), pool)
    with pytest.raises(ValueError, match="shapes do not fit"):
        PredictorView.of(
            *(torch.zeros(2, 5), torch.zeros(2), torch.zeros(2)), *(torch.zeros(3, 3), *torch.zeros(2, 3)), 0.0
        )
