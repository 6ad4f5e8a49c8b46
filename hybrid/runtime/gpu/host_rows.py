"""`HostRows`: cold neurons whose rows the GPU reads where they lie in host memory.

Two read them: the decode step's kernels, which compute the hottest of the cold neurons over PCIe while the CPU computes
the others (zero-copy), and prefill, which copies all of them to the GPU piece by piece. CUDA must know such memory:
each row is registered once, which keeps its pages where they are, and let go before it is freed. Registered memory
cannot be swapped out, so there is a limit to it. Rows of a packed model are a mapped file, which not every system lets
be registered: where it does not, those for the kernels are copied first, and prefill's pass through pinned buffers
(`cold_stream`).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np
import torch

from cpu_kernels.matrix import Matrix
from hybrid.model.ffn import FFNMatrices, HybridFFN
from hybrid.model.transformer import Transformer
from placement.placement import Placement
from profiler.common.memory import whole_memory

# Of the machine's memory, or the container's, the most that is registered.
SHARE_OF_MEMORY = 0.5
_READ_ONLY = 8  # cudaHostRegisterReadOnly, without which memory that may only be read is refused


class HostRows:
    """Keeps rows registered as long as it lives.

    cold: all cold neurons of each layer whose rows are registered, biases pinned f32; zero_copy: those of each layer
    that has some for the kernels; refused: how many of those that the placement has could not be registered, which
    leaves them to the CPU; notices: what a user should know.
    """

    def __init__(
        self,
        model: Transformer,
        placement: Placement,
        device: torch.device,
        predicted: bool = True,
        limit: int | None = None,
    ) -> None:
        """Registers rows of layers on the GPU: `placement.zero_copy` neurons of each, whatever they take, and of layer
        after layer all cold ones, until CUDA refuses or more than `limit` bytes would be registered in all, by default
        `SHARE_OF_MEMORY`.

        predicted: whether neurons are, as kernels read no cold ones otherwise.
        """
        self._native = device.type == "cuda"
        self._registered: list[Matrix] = []
        weakref.finalize(self, _let_go_of_own, self._registered, os.getpid())
        on_gpu = np.flatnonzero(placement.layer_on_gpu).tolist()
        counts = {n: int(placement.zero_copy[n]) if predicted else 0 for n in on_gpu}
        every = {n: cold_neurons(model.ffns[n]) for n in on_gpu}
        cold = {n: m for n, m in every.items() if len(m.up.rows)}
        fit = _within(cold, counts, memory_limit() if limit is None else limit)
        self.cold = {n: self._pinned(cold[n]) for n in self._register({n: cold[n] for n in fit})}
        wanted = {n: some_neurons(m, slice(0, counts[n])) for n, m in cold.items() if counts[n]}
        others = {n: _writeable(m) for n, m in wanted.items() if n not in self.cold}
        kept = {*self.cold, *self._register(others)}
        self.zero_copy = {n: others.get(n, m) for n, m in wanted.items() if n in kept}
        self.refused = sum(counts[n] for n in wanted if n not in kept)
        self.notices = tuple(_notices(self.refused, len(cold), len(fit), len(self.cold)))

    @property
    def most_zero_copy(self) -> int:
        """Zero-copy neurons of the layer that has most."""
        return max((len(zero_copy.up.rows) for zero_copy in self.zero_copy.values()), default=0)

    def _register(self, wanted: Mapping[int, FFNMatrices]) -> list[int]:
        """Register the rows of these layers, up to the one where CUDA refuses some, of which then none is; returns
        those that are. A device that is no GPU reads all memory."""
        done = list[int]()
        for number, m in wanted.items():
            before = len(self._registered)
            for matrix in _matrices(m) if self._native else ():
                if not _register(matrix):
                    _let_go(self._registered, before)
                    return done
                self._registered.append(matrix)
            done.append(number)
        return done

    def _pinned(self, m: FFNMatrices) -> FFNMatrices:
        """The same rows, with biases of which a copy does not wait either."""
        biases = (None if b is None else b.pin_memory() if self._native else b for b in (m.gate_bias, m.up_bias))
        return FFNMatrices(m.gate, m.up, m.down, *biases)


def _within(cold: Mapping[int, FFNMatrices], counts: Mapping[int, int], limit: int) -> list[int]:
    """The first layers whose cold rows fit `limit` bytes together with the zero-copy rows of all others."""
    left, fit = limit - sum(counts[n] * _row_bytes(m) for n, m in cold.items()), list[int]()
    for number, m in cold.items():
        left -= (len(m.up.rows) - counts[number]) * _row_bytes(m)
        if left < 0:
            break
        fit.append(number)
    return fit


def _notices(refused: int, layers: int, fit: int, registered: int) -> Iterator[str]:
    if refused:
        yield f"{refused:,} neurons are left to the CPU that the GPU was to read over PCIe"
    if registered < layers:
        reason = f"at most {SHARE_OF_MEMORY:.0%} of memory is pinned" if registered == fit else "CUDA pins no more"
        yield f"prompts are read slower: {reason}, which leaves out cold neurons of {layers - registered} layers"


def memory_limit() -> int:
    """Bytes that may be registered."""
    return int(SHARE_OF_MEMORY * whole_memory())


def cold_neurons(ffn: HybridFFN) -> FFNMatrices:
    """The neurons after the hot ones: views, biases f32, without that of down."""
    return some_neurons(ffn.matrices, slice(ffn.hot, None))


def some_neurons(m: FFNMatrices, some: slice) -> FFNMatrices:
    """Views of some neurons, biases f32, without that of down."""
    gate, up, down = (None if x is None else Matrix(x.rows[some], x.columns) for x in (m.gate, m.up, m.down))
    assert up is not None and down is not None
    biases = (None if bias is None else bias[some].float() for bias in (m.gate_bias, m.up_bias))
    return FFNMatrices(gate, up, down, *biases)


def _writeable(m: FFNMatrices) -> FFNMatrices:
    """The same neurons in memory of ours, where they are a mapped file."""

    def own(matrix: Matrix) -> Matrix:
        return matrix if matrix.rows.flags.writeable else Matrix(matrix.rows.copy(), matrix.columns)

    return FFNMatrices(None if m.gate is None else own(m.gate), own(m.up), own(m.down), m.gate_bias, m.up_bias)


def _matrices(m: FFNMatrices) -> list[Matrix]:
    return [matrix for matrix in (m.gate, m.up, m.down) if matrix is not None]


def _row_bytes(m: FFNMatrices) -> int:
    """Bytes of a neuron's rows."""
    return sum(matrix.row_bytes for matrix in _matrices(m))


def _register(matrix: Matrix) -> bool:
    """False where CUDA refuses."""
    flags = 0 if matrix.rows.flags.writeable else _READ_ONLY
    # Not a byte more, though whole pages are kept: a copy that is partly of registered memory is refused.
    if int(torch.cuda.cudart().cudaHostRegister(matrix.rows.ctypes.data, matrix.nbytes, flags)) == 0:
        return True
    with suppress(RuntimeError):  # the refusal is also the next launch's error, which ends there
        torch.zeros(1, device="cuda")
    return False


def _let_go_of_own(registered: list[Matrix], owner: int) -> None:
    """Let go all, but not in a child of `fork`, which has no CUDA."""
    if os.getpid() == owner:
        _let_go(registered)


def _let_go(registered: list[Matrix], first: int = 0) -> None:
    """Let go matrices from the `first` on."""
    if registered[first:]:
        with suppress(RuntimeError):  # an interrupted prompt may have left a copy of them under way
            torch.cuda.synchronize()
    for matrix in registered[first:]:
        torch.cuda.cudart().cudaHostUnregister(matrix.rows.ctypes.data)
    del registered[first:]
