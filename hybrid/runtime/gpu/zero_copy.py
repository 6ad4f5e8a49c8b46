"""`ZeroCopyNeurons`: cold neurons whose rows GPU kernels read in host memory themselves, over PCIe (zero-copy).

While the CPU's workers compute cold neurons, PCIe lies idle: the hottest of the cold neurons are computed by the GPU
from their rows in host memory. CUDA must know such memory: it is registered, which keeps its pages where they are, and
let go before it is freed. Rows of a packed model are a mapped file, which cannot be registered; those are copied first.
"""

from __future__ import annotations

import weakref
from contextlib import suppress

import numpy as np
import torch

from cpu_kernels.matrix import Matrix
from hybrid.model.ffn import FFNMatrices, HybridFFN
from hybrid.model.transformer import Transformer
from placement.placement import Placement


class ZeroCopyNeurons:
    """Keeps rows registered as long as it lives. `layers`: the zero-copy neurons of each layer that has some;
    `refused`: how many of those that the placement has could not be registered, which leaves them to the CPU."""

    def __init__(self, model: Transformer, placement: Placement, device: torch.device, predicted: bool = True) -> None:
        """Registers the rows of `placement.zero_copy` neurons of layers on the GPU, up to the layer where CUDA refuses;
        none where neurons are not `predicted`, as kernels then read no cold ones."""
        self.layers: dict[int, FFNMatrices] = {}
        self.refused = 0
        registered: list[Matrix] = []
        weakref.finalize(self, _let_go, registered)
        counts = np.where(placement.layer_on_gpu, placement.zero_copy, 0) if predicted else np.zeros(0, np.int64)
        for layer in np.flatnonzero(counts).tolist():
            zero_copy = _zero_copy(model.ffns[layer], int(counts[layer]))
            before = len(registered)
            if device.type == "cuda" and not _register(zero_copy, registered):
                _let_go(registered[before:])
                del registered[before:]
                self.refused = int(counts[layer:].sum())
                return
            self.layers[layer] = zero_copy

    @property
    def most(self) -> int:
        """Zero-copy neurons of the layer that has most."""
        return max((len(zero_copy.up.rows) for zero_copy in self.layers.values()), default=0)


def _zero_copy(ffn: HybridFFN, count: int) -> FFNMatrices:
    """The `count` neurons after the hot ones."""
    m, zero_copy = ffn.matrices, slice(ffn.hot, ffn.hot + count)

    def rows(matrix: Matrix) -> Matrix:
        own = matrix.rows[zero_copy]
        return Matrix(own if own.flags.writeable else own.copy(), matrix.columns)

    biases = (None if bias is None else bias[zero_copy] for bias in (m.gate_bias, m.up_bias))
    return FFNMatrices(None if m.gate is None else rows(m.gate), rows(m.up), rows(m.down), *biases)


def _register(zero_copy: FFNMatrices, registered: list[Matrix]) -> bool:
    """Register all rows, which join `registered` one by one; False where CUDA refuses."""
    for matrix in (zero_copy.gate, zero_copy.up, zero_copy.down):
        if matrix is not None:
            if int(torch.cuda.cudart().cudaHostRegister(matrix.rows.ctypes.data, matrix.nbytes, 0)) != 0:
                with suppress(RuntimeError):  # the refusal is also the next launch's error, which ends there
                    torch.zeros(1, device="cuda")
                return False
            registered.append(matrix)
    return True


def _let_go(registered: list[Matrix]) -> None:
    for matrix in registered:
        torch.cuda.cudart().cudaHostUnregister(matrix.rows.ctypes.data)
