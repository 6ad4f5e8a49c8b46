"""Products of many tokens with stored weights: GEMVs in small batches, or GEMMs on widened rows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from cpu_kernels.contract import MAX_BATCH
from cpu_kernels.gemv import gemv
from cpu_kernels.matrix import Matrix
from cpu_kernels.widen import widen
from cpu_kernels.worker_pool import WorkerPool

# Rows widened to f32 at a time: 32 MB at d=4096, and large enough for GEMM to run at full speed.
GEMM_ROWS = 2048


def blocks(n: int, first: int = 0) -> list[slice]:
    """`first` to n in slices of `GEMM_ROWS`."""
    return [slice(start, min(start + GEMM_ROWS, n)) for start in range(first, n, GEMM_ROWS)]


def widened(matrix: Matrix, rows: slice, pool: WorkerPool) -> torch.Tensor:
    """Some rows of weights, f32 [k, columns]."""
    return torch.from_numpy(widen(matrix, rows, pool))


def linear(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, pool: WorkerPool) -> torch.Tensor:
    """x W^T + b for x f32 [t, d]; rows are widened once for all tokens."""
    out = torch.empty(x.shape[0], matrix.shape[0])
    for rows in blocks(out.shape[1]):
        out[:, rows] = F.linear(x, widened(matrix, rows, pool), None if bias is None else bias[rows])
    return out


def linear_few(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, pool: WorkerPool) -> torch.Tensor:
    """The same, a few tokens at a time, whose rows are read as they are stored: faster for up to some dozen tokens."""
    out = np.empty((x.shape[0], matrix.shape[0]), np.float32)
    added = np.empty(0, np.float32) if bias is None else bias.numpy()
    tokens = np.ascontiguousarray(x.numpy())
    for start in range(0, len(out), MAX_BATCH):
        few = slice(start, start + MAX_BATCH)
        gemv(matrix, tokens[few], added, out[few], pool)
    return torch.from_numpy(out)
