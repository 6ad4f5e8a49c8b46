"""`RegisteredRows`: rows of matrices in host memory that GPU kernels may read where they are, over PCIe (zero-copy).

While the CPU's workers compute cold neurons, PCIe lies idle: the hottest of the cold neurons are computed by the GPU
from their rows in host memory. CUDA must know such memory: it is registered, which keeps its pages where they are, and
let go before it is freed. A packed model's rows are a mapped file, which is not registered.
"""

from __future__ import annotations

import weakref

import torch

from cpu_kernels.matrix import Matrix
from hybrid.model import Transformer
from placement.placement import Placement


class RegisteredRows:
    """Keeps rows registered as long as it lives. `counts`: int64 [n_layers], neurons after the hot ones; `refused`: how
    many of those that the placement has could not be registered, which leaves them to the CPU."""

    def __init__(self, model: Transformer, placement: Placement, device: torch.device) -> None:
        """Registers the rows of `placement.zero_copy` neurons; of none, where CUDA refuses or rows are mapped."""
        self.counts, self.refused = placement.zero_copy.copy(), 0
        done: list[tuple[int, Matrix]] = []  # with the matrices, which may not be freed before
        weakref.finalize(self, _let_go, done)
        if device.type != "cuda":
            return
        for layer, count in enumerate(self.counts.tolist()):
            ffn = model.ffns[layer]
            matrices = [m for m in (ffn.gate, ffn.up, ffn.down) if m is not None]
            if count and not all(_register(matrix, ffn.hot, count, done) for matrix in matrices):
                self.refused = int(self.counts[layer:].sum())
                self.counts[layer:] = 0
                return


def _register(matrix: Matrix, first: int, count: int, done: list[tuple[int, Matrix]]) -> bool:
    if not matrix.rows.flags.writeable:
        return False
    address = matrix.rows.ctypes.data + first * matrix.row_bytes
    if int(torch.cuda.cudart().cudaHostRegister(address, count * matrix.row_bytes, 0)) != 0:
        return False
    done.append((address, matrix))
    return True


def _let_go(registered: list[tuple[int, Matrix]]) -> None:
    for address, _ in registered:
        torch.cuda.cudart().cudaHostUnregister(address)
