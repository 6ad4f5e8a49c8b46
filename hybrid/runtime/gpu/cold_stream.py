"""`ColdStream`: cold neurons of a prompt's layers pass through the GPU, piece by piece, while it computes.

    copy stream      copy 0 | copy 1 | copy 2          registered rows (`host_rows`) to the GPU
    compute stream          | compute 0      | compute 1        the caller's

Rows that are not registered have their pieces filled into pinned memory first, by a thread of its own:

    copying thread   fill 0 | fill 1 | fill 2          host rows to pinned memory, by torch's threads
    copy stream             | copy 0 | copy 1          pinned memory to the GPU

There are two buffers on each side. Who waits: the copy stream, on the GPU, for the computation that read the buffer
before; the compute stream for the copy; the copying thread for a buffer's last copy to the GPU before it fills it. The
caller never waits for registered rows, for others until a copy has been asked for; it polls, as Ctrl-C inside a
condition's wait may leave its lock taken, or free and released once more. A piece is asked for when the
computation of the one two before it has been, across layers, so that copies go on while attention is computed.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.sparse_ffn import DeviceFFNView
from hybrid.model.ffn import FFNMatrices, HybridFFN
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.cold_workers import start_thread
from hybrid.runtime.gpu.gemm import pieces
from hybrid.runtime.gpu.host_rows import cold_neurons
from placement.plan import aligned
from profiler.common.openmp import torch_threads

PART = "workspace: staging"
_BUFFERS = 2
_POLL_SECONDS = 2e-5


class _Piece(NamedTuple):
    """Some of a layer's cold neurons."""

    layer: int
    rows: slice


@dataclass(eq=False)
class _Asked:
    """A piece that is asked for: once it has `ended`, its `view` or an `error`; neither where it was `dropped`."""

    view: DeviceFFNView | None = None
    error: BaseException | None = None
    ended: bool = False
    dropped: bool = False

    def run(self, copy: _Copy) -> None:
        try:
            self.view = None if self.dropped else copy()
        except BaseException as error:  # noqa: BLE001 - raised by `result`, in the thread that asked
            self.error = error
        finally:
            self.ended = True

    def wait(self) -> None:
        while not self.ended:
            time.sleep(_POLL_SECONDS)

    def result(self) -> DeviceFFNView:
        self.wait()
        if self.error is not None:
            raise self.error
        assert self.view is not None
        return self.view


_Copy = Callable[[], DeviceFFNView | None]
_Jobs = queue.SimpleQueue[tuple[_Asked, _Copy] | None]


def _nothing() -> None:
    """A copy of nothing."""


def _serve(jobs: _Jobs) -> None:
    """The copying thread's life: `jobs` until one of them is None."""
    while (job := jobs.get()) is not None:
        asked, copy = job
        asked.run(copy)
        del job, asked, copy  # an idle thread keeps nothing alive


class _Events:
    """A buffer's: `copied` to the GPU, and `used` there. Without a GPU nothing is ever under way."""

    def __init__(self, native: bool) -> None:
        self.copied = torch.cuda.Event() if native else None
        self.used = torch.cuda.Event() if native else None


class ColdStream:
    """Two staging buffers of up to `neurons` neurons. `begin` names the layers, then `layer` gives each its pieces."""

    def __init__(
        self,
        ffns: Mapping[int, HybridFFN],
        neurons: int,
        arena: DeviceArena,
        registered: Mapping[int, FFNMatrices],
        threads: int,
    ) -> None:
        """Takes the buffers on the device from `arena`, and as much pinned memory where a layer is not `registered`.

        ffns: of the layers that have cold neurons; registered: of some of them all cold neurons, whose rows the GPU
        reads; threads: of torch's, that fill pinned memory.
        """
        self._neurons, self._device, self._threads = neurons, arena.device, threads
        native = arena.device.type == "cuda" and not arena.counts_only
        self._activation = next(iter(ffns.values())).act.name
        self._cold = {number: registered.get(number) or cold_neurons(ffn) for number, ffn in ffns.items()}
        self._staging = ffns.keys() - registered.keys()
        size = max(sum(aligned(neurons * width) for width in _widths(m)) for m in self._cold.values())
        self._staged = [arena.empty(PART, (size,), torch.uint8) for _ in range(_BUFFERS)]
        self._filled: list[torch.Tensor] = []
        if self._staging and not arena.counts_only:
            self._filled = [torch.empty(size, dtype=torch.uint8, pin_memory=native) for _ in range(_BUFFERS)]
        self._events = [_Events(native) for _ in range(_BUFFERS)]
        self._copies = torch.cuda.Stream(arena.device) if native else None
        self._jobs: _Jobs = queue.SimpleQueue()
        if self._filled:
            weakref.finalize(self, self._jobs.put, None)
            start_thread(threading.Thread(target=_serve, args=(self._jobs,), name="hybrid-staging", daemon=True))
        self._pieces: list[_Piece] = []
        self._asked: list[_Asked] = []
        self._next = 0

    def begin(self, first: Mapping[int, int]) -> None:
        """Start to copy cold neurons of these layers, in this order, each layer's from the `first` of the cold ones on.
        What an earlier call left is dropped."""
        self._settle()
        self._pieces = [
            _Piece(layer, slice(start + piece.start, start + piece.stop))
            for layer, start in first.items()
            for piece in pieces(len(self._cold[layer].up.rows) - start, self._neurons)
        ]
        self._asked, self._next = [], 0
        for _ in range(_BUFFERS):
            self._ask()

    def layer(self, number: int) -> Iterator[DeviceFFNView]:
        """The layer's cold neurons in order, on the device: each view may be used until the next is asked for."""
        while self._next < len(self._pieces) and self._pieces[self._next].layer == number:
            at, events = self._next, self._events[self._next % _BUFFERS]
            view = self._asked[at].result()
            if events.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(events.copied)
            yield view
            if events.used is not None:
                events.used.record(torch.cuda.current_stream(self._device))
            self._next += 1
            self._ask()

    def _ask(self) -> None:
        """Have the next piece copied, if there is one."""
        at = len(self._asked)
        if at == len(self._pieces):
            return
        buffer, piece = at % _BUFFERS, self._pieces[at]
        if piece.layer in self._staging:
            asked = _Asked()
            self._jobs.put((asked, partial(self._fill, buffer, piece)))
            self._asked.append(asked)
        else:
            self._asked.append(_Asked(self._copy(buffer, piece, None), ended=True))

    def _settle(self) -> None:
        """Wait for what an interrupted answer left under way, of which it may have noted less than it asked for."""
        for asked in self._asked:
            asked.dropped = True
        if self._filled:
            last = _Asked(dropped=True)
            self._jobs.put((last, _nothing))
            last.wait()
        if self._copies is not None:
            self._copies.synchronize()

    def _fill(self, buffer: int, piece: _Piece) -> DeviceFFNView:
        """Copy a piece by way of pinned memory; runs in the copying thread."""
        events = self._events[buffer]
        if events.copied is not None:
            events.copied.synchronize()
        with torch_threads(self._threads):
            return self._copy(buffer, piece, self._filled[buffer])

    def _copy(self, buffer: int, piece: _Piece, filled: torch.Tensor | None) -> DeviceFFNView:
        """Ask for the copy of a piece to the GPU, by way of `filled` or from where it lies."""
        m, events, at = self._cold[piece.layer], self._events[buffer], 0
        placed: list[torch.Tensor | None] = []
        with self._on_copies(buffer):
            for source, width in zip(_sources(m, piece.rows), _widths(m), strict=True):
                if source is None:
                    placed.append(None)
                    continue
                place = slice(at, at + source.nbytes)
                stored = source.reshape(-1).view(torch.uint8)
                if filled is not None:
                    stored = filled[place].copy_(stored)
                self._staged[buffer][place].copy_(stored, non_blocking=True)
                placed.append(self._staged[buffer][place].view(source.dtype).view(source.shape))
                at += aligned(self._neurons * width)
        if events.copied is not None:
            events.copied.record(self._copies)
        return _view(m, self._activation, placed)

    def _on_copies(self, buffer: int) -> AbstractContextManager[object]:
        """The copy stream, once the buffer's last computation is done."""
        events = self._events[buffer]
        if self._copies is None or events.used is None:
            return nullcontext()
        self._copies.wait_event(events.used)
        return torch.cuda.stream(self._copies)


def _widths(m: FFNMatrices) -> list[int]:
    """Bytes that one neuron has in each of `_sources`; 0 where there is none."""
    rows, biases = (m.gate, m.up, m.down), (m.gate_bias, m.up_bias)
    return [*(0 if x is None else x.row_bytes for x in rows), *(0 if b is None else 4 for b in biases)]


def _sources(m: FFNMatrices, some: slice) -> list[torch.Tensor | None]:
    """Rows of gate, up and down as they are stored, and the biases, f32."""
    rows, biases = (m.gate, m.up, m.down), (m.gate_bias, m.up_bias)
    return [*(None if x is None else x.tensor(some) for x in rows), *(None if b is None else b[some] for b in biases)]


def _view(m: FFNMatrices, activation: str, placed: Sequence[torch.Tensor | None]) -> DeviceFFNView:
    gate, up, down = (None if rows is None else DeviceMatrix(rows, m.up.columns, m.up.dtype) for rows in placed[:3])
    assert up is not None and down is not None
    return DeviceFFNView(gate, up, down, placed[3], placed[4], activation)
