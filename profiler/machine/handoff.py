"""What handing a layer's FFN from the GPU to the CPU's workers and back takes, by the mailbox of the decode step.

Threads: a thread of its own runs `serve` on a pool of its own from `__enter__` to `__exit__`, as an engine's does while
an answer is written. Who waits: `seconds` for each replay of a CUDA graph, the GPU in it for the workers.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels.contract import Flag, Op, activation_word
from cpu_kernels.decode_buffers import LEARNED, Column, Shape, new_own, new_shared
from cpu_kernels.mailbox import Box, serve, stop
from cpu_kernels.worker_pool import Each, WorkerPool
from gpu_kernels.box import REPORT_WORDS, Mailbox, State
from gpu_kernels.mailbox import ask, post, receive, send

_REPLAYS = 40
_EPS = 1e-5
_ONE = 0x3C00  # a bf16 of 2^-7: every neuron fires, and what it adds is exact
_NEVER = 2**62  # beyond any request's number
_POLL_SECONDS = 1e-4


class HandoffShape(NamedTuple):
    """Layers that hand over, their width, and cold neurons of each: 403 MB in bf16, more than a cache holds."""

    layers: int = 32
    d: int = 4096
    neurons: int = 512


class Handoff:
    """Layers of cold bf16 neurons in host memory, a mailbox, and the workers behind it. A context manager.

    x: f32 [1, d] on the device, to which each layer adds its active neurons.
    """

    def __init__(self, device: torch.device, threads: int, shape: HandoffShape | None = None) -> None:
        """threads: CPU workers. Without CUDA the same kernels run in Triton's interpreter, as tests want."""
        self.shape = shape or HandoffShape()
        layers, d, f = self.shape
        self._device, self._pool = device, WorkerPool(threads)
        self._weights = np.full((layers, 3, f, d), _ONE, np.uint16)
        self.x, self._normed, self._norm = (torch.ones(size, device=device) for size in ((1, d), (1, d), (d,)))
        self._masks = torch.zeros(layers, f, dtype=torch.int32, device=device)
        self._spare = torch.zeros(f, dtype=torch.int32, device=device)
        self._hot_ids, self._hot_count = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        self._positions = torch.zeros(1, dtype=torch.int32, device=device)
        report = torch.zeros(REPORT_WORDS, dtype=torch.int64, device=device)
        self._mailbox = Mailbox.new(d, f, report, pinned=device.type == "cuda")
        self._mailbox.out.fill_(1e9)  # what no answer may leave there
        m = self._mailbox
        masks = m.masks.numpy().view(np.uint32)
        self._box = Box(*(m.request.numpy(), m.flags.numpy(), m.x.numpy(), m.ids.numpy(), masks, m.out.numpy()))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="hybrid-handoff", daemon=True)

    def __enter__(self) -> Handoff:
        self._thread.start()
        while not self._box.flags[Flag.READY] and self._thread.is_alive():  # they may have to be compiled first
            time.sleep(_POLL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._box)
        self._thread.join()
        self._pool.close()

    @property
    def neuron_bytes(self) -> int:
        """Bytes of the three rows of a neuron."""
        return 3 * self.shape.d * self._weights.itemsize

    def empty(self) -> None:
        """Launch a step of which each layer sends its input and asks for the FFN of no neuron."""
        for _ in range(self.shape.layers):
            ask(Op.FFN, self.shape.layers, self._normed, self._mailbox, self._positions, 1)
            self._receive()

    def active(self) -> None:
        """Launch a step of which each layer compacts its masks and asks for the FFN of the neurons drawn last."""
        hot = (self._hot_ids, self._spare, self._hot_count, self._spare)  # there are none
        for layer in range(self.shape.layers):
            post(self.x, self._norm, None, _EPS, self._normed, self._mailbox)
            send(self._masks[layer], 0, *hot, self._mailbox, layer, self._positions)
            self._receive()

    def _receive(self) -> None:
        receive(self.x, None, None, self._norm, None, _EPS, self._normed, self._mailbox, asked=True)

    def draw(self, count: int, seed: int) -> None:
        """Choose `count` active neurons of each layer."""
        ranks = np.random.default_rng(seed).permuted(
            np.tile(np.arange(self.shape.neurons), (self.shape.layers, 1)), axis=1
        )
        self._masks.copy_(torch.from_numpy((ranks < count).astype(np.int32)))

    def seconds(self, count: int = 0, replays: int = _REPLAYS) -> float:
        """Median seconds of a layer with `count` active neurons inside a CUDA graph of all layers: the input to the
        host, the request, the workers, and the sum with the next norm; with neurons also the norm before and the
        compaction. Needs CUDA.

        Raises what a worker raised, and `RuntimeError` when an answer did not come.
        """
        graph = self._capture(self.active if count else self.empty, count)
        times = []
        for replay in range(replays):
            self.draw(count, replay)  # so that no cache has the rows of the replay before
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        self.check()
        return statistics.median(times) / self.shape.layers

    def check(self) -> None:
        """Raise what went wrong in the steps so far."""
        if self._error is not None:
            raise self._error
        if int(self._mailbox.state[State.FAILED]):
            raise RuntimeError(f"the CPU's workers did not answer the GPU within {self._mailbox.timeout:g} s")

    def _capture(self, launch: Callable[[], None], count: int) -> torch.cuda.CUDAGraph:
        self.draw(count, 0)
        launch()  # outside of the graph first, as capture may not compile
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        return graph

    def _table(self) -> np.ndarray:
        """The layers' rows of the decode step's table, and one of a layer without cold neurons."""
        table = np.zeros((self.shape.layers + 1, len(Column)), np.int64)
        for row, matrices in zip(table, self._weights, strict=False):
            row[[Column.GATE, Column.UP, Column.DOWN]] = [matrix.ctypes.data for matrix in matrices]
        table[-1] = table[0]
        table[-1, Column.HOT] = self.shape.neurons
        return table

    def _serve(self) -> None:
        _, d, f = self.shape
        sizes = {"heads": 1, "kv_heads": 1, "head_dim": d, "vocab": 1, "blocks": 1, "block_size": 1, "layer_norm": 0}
        shape = Shape(d, f, **sizes, activation=activation_word("relu"), strategy=LEARNED)
        workers, like = self._pool.threads, np.empty((1, 128), np.uint16)
        likes = (like, like, like, like, np.empty(1, np.int16), np.empty((1, 128), np.int8))
        rotation = np.empty((1, 0), np.float32), np.empty((1, 0), np.float32)
        shared, owns = new_shared(shape, 0, workers, 1), Each(new_own(shape, 0) for _ in range(workers))
        given = (self._box, likes, self._table(), shape, _EPS, rotation, shared, owns)
        try:
            self._pool.run(serve, workers, self._pool.barrier, *given)
        except BaseException as error:  # noqa: BLE001 - raised by `check`, in the thread that measures
            self._error = error
        finally:
            self._box.flags[Flag.DONE] = _NEVER  # no wait of the GPU outlives the workers
