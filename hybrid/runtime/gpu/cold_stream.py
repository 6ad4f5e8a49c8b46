"""`ColdStream`: cold neurons of a prompt's layers pass through the GPU, piece by piece, while it computes.

    copying thread   fill 0 | fill 1 | fill 2         | fill 3 ...       host rows to pinned memory, by torch's threads
    copy stream             | copy 0 | copy 1         | copy 2           pinned memory to the GPU
    compute stream                   | compute 0      | compute 1        the caller's

There are two buffers on each side. Who waits: the copying thread for a buffer's last copy to the GPU before it fills
it; the copy stream, on the GPU, for the computation that read the buffer before; the compute stream for the copy. The
caller waits only until a copy has been asked for. A piece is asked for when the computation of the one two before it
has been, across layers, so that copies go on while attention is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from cpu_kernels.matrix import Matrix
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.sparse_ffn import DeviceFFNView
from hybrid.model.ffn import HybridFFN
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.gemm import pieces
from placement.plan import aligned

PART = "workspace: staging"
_BUFFERS = 2


class _Piece(NamedTuple):
    """Some neurons of a layer."""

    layer: int
    rows: slice


class _Events:
    """A buffer's: `copied` to the GPU, and `used` there. Without a GPU nothing is ever under way."""

    def __init__(self, native: bool) -> None:
        self.copied = torch.cuda.Event() if native else None
        self.used = torch.cuda.Event() if native else None


class ColdStream:
    """Two staging buffers of up to `neurons` neurons. `begin` names the layers, then `layer` gives each its pieces."""

    def __init__(self, ffns: Sequence[HybridFFN], neurons: int, arena: DeviceArena) -> None:
        """Takes the buffers on the device from `arena`, and as much pinned memory."""
        self._ffns, self._neurons, self._device = ffns, neurons, arena.device
        native = arena.device.type == "cuda" and not arena.counts_only
        size = max(sum(aligned(neurons * width) for width in _widths(ffn)) for ffn in ffns)
        self._staged = [arena.empty(PART, (size,), torch.uint8) for _ in range(_BUFFERS)]
        self._filled: list[torch.Tensor] = []
        if not arena.counts_only:
            self._filled = [torch.empty(size, dtype=torch.uint8, pin_memory=native) for _ in range(_BUFFERS)]
        self._events = [_Events(native) for _ in range(_BUFFERS)]
        self._copies = torch.cuda.Stream(arena.device) if native else None
        self._thread = ThreadPoolExecutor(1, "hybrid-staging")
        self._pieces: list[_Piece] = []
        self._futures: list[Future[DeviceFFNView]] = []
        self._next = 0

    def begin(self, layers: Sequence[int]) -> None:
        """Start to copy the cold neurons of these layers, in this order. What an earlier call left is dropped."""
        self._settle()
        self._pieces = [
            _Piece(layer, slice(hot + piece.start, hot + piece.stop))
            for layer in layers
            for hot, cold in [_hot_and_cold(self._ffns[layer])]
            for piece in pieces(cold, self._neurons)
        ]
        self._futures, self._next = [], 0
        for _ in range(_BUFFERS):
            self._ask()

    def layer(self, number: int) -> Iterator[DeviceFFNView]:
        """The layer's cold neurons in order, on the device: each view may be used until the next is asked for."""
        while self._next < len(self._pieces) and self._pieces[self._next].layer == number:
            at, events = self._next, self._events[self._next % _BUFFERS]
            view = self._futures[at].result()
            if events.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(events.copied)
            yield view
            if events.used is not None:
                events.used.record(torch.cuda.current_stream(self._device))
            self._next += 1
            self._ask()

    def _ask(self) -> None:
        """Have the next piece filled and copied, if there is one."""
        at = len(self._futures)
        if at < len(self._pieces):
            self._futures.append(self._thread.submit(self._fill, at % _BUFFERS, self._pieces[at]))

    def _settle(self) -> None:
        """Wait for what an interrupted answer left under way."""
        for future in self._futures[self._next :]:
            future.cancel()
        for future in self._futures[self._next :]:
            if not future.cancelled():
                future.exception()
        if self._copies is not None:
            self._copies.synchronize()

    def _fill(self, buffer: int, piece: _Piece) -> DeviceFFNView:
        """Copy a piece to pinned memory and ask for its copy to the GPU; runs in the copying thread."""
        ffn, events = self._ffns[piece.layer], self._events[buffer]
        if events.copied is not None:
            events.copied.synchronize()
        sources, at = _sources(ffn, piece.rows), 0
        placed: list[torch.Tensor | None] = []
        for source, width in zip(sources, _widths(ffn), strict=True):
            if source is None:
                placed.append(None)
                continue
            place = slice(at, at + source.nbytes)
            self._filled[buffer][place].copy_(source.reshape(-1).view(torch.uint8))
            with self._on_copies(buffer):
                self._staged[buffer][place].copy_(self._filled[buffer][place], non_blocking=True)
            placed.append(self._staged[buffer][place].view(source.dtype).view(source.shape))
            at += aligned(self._neurons * width)
        if events.copied is not None:
            events.copied.record(self._copies)
        return _view(ffn, placed)

    def _on_copies(self, buffer: int) -> AbstractContextManager[object]:
        """The copy stream, once the buffer's last computation is done."""
        events = self._events[buffer]
        if self._copies is None or events.used is None:
            return nullcontext()
        self._copies.wait_event(events.used)
        return torch.cuda.stream(self._copies)


def _hot_and_cold(ffn: HybridFFN) -> tuple[int, int]:
    return ffn.hot, ffn.up.shape[0] - ffn.hot


def _parts(ffn: HybridFFN) -> tuple[tuple[Matrix | None, ...], tuple[torch.Tensor | None, ...]]:
    m = ffn.matrices
    return (m.gate, m.up, m.down), (m.gate_bias, m.up_bias)


def _widths(ffn: HybridFFN) -> list[int]:
    """Bytes that one neuron has in each of `_sources`; 0 where there is none."""
    matrices, biases = _parts(ffn)
    return [*(0 if m is None else m.row_bytes for m in matrices), *(0 if b is None else 4 for b in biases)]


def _sources(ffn: HybridFFN, rows: slice) -> list[torch.Tensor | None]:
    """Rows of gate, up and down as they are stored, and of the biases as f32."""
    matrices, biases = _parts(ffn)
    return [
        *(None if m is None else m.tensor(rows) for m in matrices),
        *(None if b is None else b[rows].float() for b in biases),
    ]


def _view(ffn: HybridFFN, placed: Sequence[torch.Tensor | None]) -> DeviceFFNView:
    gate, up, down = (None if rows is None else DeviceMatrix(rows, ffn.up.columns, ffn.up.dtype) for rows in placed[:3])
    assert up is not None and down is not None
    return DeviceFFNView(gate, up, down, placed[3], placed[4], ffn.act.name)
