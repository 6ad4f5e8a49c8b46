"""The low-rank predictor kernel against its reference."""

import numpy as np
import pytest
import torch

from cpu_kernels.lanes import kernel_view
from cpu_kernels.low_rank import predict_rows, predict_rows_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "r", "f"), [(1, 1, 1), (17, 3, 65), (384, 96, 1536)])
@pytest.mark.parametrize("threshold", [-1e9, 0.0, 0.7, 1e9])
def test_matches_reference(d, r, f, dtype, threshold):
    g = torch.Generator().manual_seed(d + r + f)
    fc1, fc2 = (kernel_view((torch.randn(n, m, generator=g) * m**-0.5).to(dtype)) for n, m in ((r, d), (f, r)))
    x, b1, b2 = (torch.randn(n, generator=g).numpy() for n in (d, r, f))
    rows = np.full(f, -1, np.int32)
    count = predict_rows(x, fc1, b1, fc2, b2, threshold, np.empty(r, np.float32), rows)
    truth = predict_rows_ref(x, fc1, b1, fc2, b2, threshold)
    assert rows[:count].tolist() == truth.tolist()
    assert (rows[count:] == -1).all()
    assert count == {-1e9: f, 1e9: 0}.get(threshold, count)


def test_misfits_are_refused():
    zeros = np.zeros((2, 2), np.float32)
    one = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="shapes do not fit"):
        predict_rows(np.zeros(3, np.float32), zeros, one, zeros, one, 0.0, one, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="int32 rows"):
        predict_rows(one, zeros, one, zeros, one, 0.0, one, np.zeros(2, np.int64))
