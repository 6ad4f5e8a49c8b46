"""Products of many tokens with stored weights, by the kernels: GEMVs in small batches, or a GEMM."""

from __future__ import annotations

import numpy as np
import torch

from cpu_kernels.contract import MAX_BATCH
from cpu_kernels.gemm import GemmScratch, gemm
from cpu_kernels.gemv import gemv
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool

_NO_BIAS = np.empty(0, np.float32)


def linear(
    x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, pool: WorkerPool, scratch: GemmScratch
) -> torch.Tensor:
    """x W^T + b for x f32 [t, d], in f32."""
    out = torch.empty(x.shape[0], matrix.shape[0])
    added = _NO_BIAS if bias is None else bias.numpy()
    gemm(matrix, np.ascontiguousarray(x.numpy()), added, out.numpy(), pool, scratch)
    return out


def linear_few(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, pool: WorkerPool) -> torch.Tensor:
    """The same, a few tokens at a time: faster for up to some dozen tokens."""
    out = np.empty((x.shape[0], matrix.shape[0]), np.float32)
    added = _NO_BIAS if bias is None else bias.numpy()
    tokens = np.ascontiguousarray(x.numpy())
    for start in range(0, len(out), MAX_BATCH):
        few = slice(start, start + MAX_BATCH)
        gemv(matrix, tokens[few], added, out[few], pool)
    return torch.from_numpy(out)
