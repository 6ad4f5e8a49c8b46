"""`ColdWorkers`: the CPU's side of the mailbox while an answer is written.

Threads: one of its own, which runs `serve` on the engine's `WorkerPool` from `start` to `stop`; the
pool's threads poll pinned host memory. `stop` may block until the workers have finished the request they are at, which
is at most a layer. Whatever ends the workers, an exception included, ends the GPU's waits as well: the last answer's
number is set beyond any request, so that no wait of the GPU outlives them, and `check` raises what they raised.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from cpu_kernels.contract import Flag
from cpu_kernels.mailbox import Box, serve, stop
from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels.box import REPORT_WORDS, Mailbox, State, Tally
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.gpu.arena import DeviceArena
from profiler.common.spec import Strategy

_NEVER = 2**62  # beyond any request's number
_POLL_SECONDS = 2e-5


@dataclass(eq=False)
class _Service:
    """The workers' time from `start` to `stop`. Ctrl-C may come anywhere in those, and in `Thread.start` and `join`,
    after which a thread that runs may be taken for one that does not; so its state is kept here."""

    strategy: Strategy
    process: int = field(default_factory=os.getpid)
    claims: list[str] = field(default_factory=list)
    ended: bool = False
    error: BaseException | None = None

    def claim(self, what: Literal["serve", "stop"]) -> bool:
        """Whether the thread serves, asked when it begins to and when it is to stop: it does if it asked first."""
        self.claims.append(what)
        return self.claims[0] == "serve"

    def is_running(self) -> bool:
        """Whether its thread serves or may begin to: not in a child of fork, which has none, nor when Python ends,
        which runs no other thread any more."""
        return not self.ended and self.process == os.getpid() and not sys.is_finalizing()

    def is_ready(self, strategy: Strategy) -> bool:
        return self.strategy == strategy and "stop" not in self.claims and self.is_running()


def start_thread(thread: threading.Thread) -> None:
    """`thread.start()`, of which Ctrl-C remains Ctrl-C: in the wait for the thread's begin it may come between a lock's
    release and its return, and then leaves as the lock's `RuntimeError`."""
    try:
        thread.start()
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


class ColdWorkers:
    """The mailbox in pinned host memory, and the workers behind it. `mailbox`: what the GPU's kernels take."""

    def __init__(self, step: CpuStep, pool: WorkerPool, arena: DeviceArena) -> None:
        shape = step.arguments("dense").shape
        pinned = arena.device.type == "cuda" and not arena.counts_only

        self._step, self._pool = step, pool
        self.report = arena.zeros("workspace: mailbox", (REPORT_WORDS,), torch.int64)
        self.mailbox = Mailbox.new(shape.d, shape.f, self.report, pinned)
        m = self.mailbox
        masks = m.masks.numpy().view(np.uint32)
        self._box = Box(*(m.request.numpy(), m.flags.numpy(), m.x.numpy(), m.ids.numpy(), masks, m.out.numpy()))
        self._service: _Service | None = None
        weakref.finalize(self, stop, self._box)  # also at exit: polling threads must not outlive the memory
        self._sent, self._waited = [0] * len(Tally), 0

    def start(self, strategy: Strategy) -> None:
        """Make the workers ready for `strategy`; nothing to do where they are. The GPU must be idle."""
        if self._service is not None and self._service.is_ready(strategy):
            return
        self.stop()
        self.report.zero_()
        if self.report.is_cuda:
            torch.cuda.synchronize(self.report.device)
        self._box.request[:], self._box.flags[:] = 0, 0
        self._sent, self._waited = [0] * len(Tally), 0
        self._service = service = _Service(strategy)
        start_thread(threading.Thread(target=self._serve, args=(service,), name="hybrid-mailbox", daemon=True))
        # The GPU waits for seconds only, and the workers may have to be compiled first.
        while not self._box.flags[Flag.READY] and service.is_running():
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Send the workers to sleep and wait until they are; a second call does nothing."""
        if self._service is None:
            return
        if self._service.claim("stop"):
            stop(self._box)
            while self._service.is_running():
                time.sleep(_POLL_SECONDS)
        self._service = None

    def check(self) -> None:
        """Raise what a worker raised, and `RuntimeError` where they went home in the middle of a step."""
        if self._service is not None and self._service.error is not None:
            raise self._service.error
        if self._box.flags[Flag.DONE] == _NEVER:
            raise RuntimeError("the CPU's workers were sent home in the middle of a step; ask again")

    def late(self) -> RuntimeError:
        """What to raise when the GPU gave up waiting."""
        seconds = self.mailbox.timeout
        return RuntimeError(
            f"the CPU's workers did not answer the GPU within {seconds:g} s; were they stopped? Ask again to go on"
        )

    def sent(self, report: torch.Tensor) -> tuple[int, int]:
        """Hot and cold neurons since the last call, by a copy of `report`."""
        now = report[len(State) :].tolist()
        hot, sent, zero_copy = (after - before for after, before in zip(now, self._sent, strict=True))
        self._sent = now
        return hot, sent + zero_copy

    def waited(self, report: torch.Tensor) -> float:
        """Seconds that the GPU waited for the workers since the last call, by a copy of `report`."""
        now = int(report[State.WAITED])
        before, self._waited = self._waited, now
        return (now - before) / 1e9

    @property
    def logits(self) -> np.ndarray:
        """f32 [rows, vocab], of a head on the CPU."""
        logits: np.ndarray = self._step.arguments("dense").shared.logits
        return logits

    def _serve(self, service: _Service) -> None:
        if not service.claim("serve"):
            return
        try:
            given = (self._box, *self._step.arguments(service.strategy))
            self._pool.run(serve, self._pool.threads, self._pool.barrier, *given)
        except BaseException as error:  # noqa: BLE001 - raised by `check`, in the thread that asked
            service.error = error
        finally:
            self._box.flags[Flag.DONE] = _NEVER
            service.ended = True
