"""The low-rank predictor kernel against its reference."""

import numpy as np
import pytest
import torch

from cpu_kernels.low_rank import PredictorView, predict_rows, predict_rows_ref
from cpu_kernels.worker_pool import WorkerPool


def make(d, r, f, threshold=0.0):
    g = torch.Generator().manual_seed(d + r + f)
    fc1, fc2 = (torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in ((r, d), (f, r)))
    s1, s2 = torch.rand(r, generator=g) / 100, torch.rand(f, generator=g) / 100
    b1, b2 = torch.randn(r, generator=g), torch.randn(f, generator=g)
    return PredictorView.of(fc1, s1, b1, fc2, s2, b2, threshold), torch.randn(d, generator=g).numpy()


@pytest.mark.parametrize(("d", "r", "f"), [(1, 1, 1), (17, 3, 65), (384, 96, 1536)])
@pytest.mark.parametrize("threshold", [-1e9, 0.0, 0.7, 1e9])
def test_matches_reference(d, r, f, threshold):
    view, x = make(d, r, f, threshold)
    ours, truth = np.full((2, f), -1, np.int32)
    count = predict_rows(view, x, ours, WorkerPool(1))
    assert count == predict_rows_ref(view, x, truth, None)
    assert ours.tolist() == truth.tolist()
    assert count == {-1e9: f, 1e9: 0}.get(threshold, count)


def test_same_ids_for_any_number_of_workers():
    view, x = make(1024, 2048, 3001)
    found = []
    for threads in (1, 2, 3):
        pool, rows = WorkerPool(threads), np.zeros(3001, np.int32)
        assert pool.workers_for(view.fc2.nbytes) == threads
        found.append((predict_rows(view, x, rows, pool), rows.tolist()))
        pool.close()
    assert found[0] == found[1] == found[2] and 0 < found[0][0] < 3001


def test_misfits_are_refused():
    view, x = make(5, 2, 3)
    pool = WorkerPool(1)
    with pytest.raises(ValueError, match="wants f32 x of 5"):
        predict_rows(view, x[:4], np.zeros(3, np.int32), pool)
    with pytest.raises(ValueError, match="wants int32 rows of 3"):
        predict_rows(view, x, np.zeros(3, np.int64), pool)
    with pytest.raises(ValueError, match="shapes do not fit"):
        PredictorView.of(
            *(torch.zeros(2, 5), torch.zeros(2), torch.zeros(2)), *(torch.zeros(3, 3), *torch.zeros(2, 3)), 0.0
        )
