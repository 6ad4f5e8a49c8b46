"""Ctrl-C as a chat needs it: it raises only where an interruption is expected, and there only once.

Python raises KeyboardInterrupt wherever the main thread happens to be, also in the middle of the clean-up after an
earlier one, which would lose the conversation. The guard turns the next Ctrl-C into a flag; one more, for a chat that
does not come back, ends the program at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType


class InterruptGuard:
    """A context manager that owns SIGINT; inside it only code under `allowed()` sees KeyboardInterrupt.

    On a thread other than the main one, where Python delivers no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._armed = False
        self._flagged = False
        self._on_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> InterruptGuard:
        if self._on_main_thread:
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_main_thread:
            signal.signal(signal.SIGINT, self._previous)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let the first Ctrl-C inside the block raise KeyboardInterrupt.

        `pressed` tells whether there was one: code far below may have swallowed the exception.
        """
        self.pressed = self._flagged = False
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt
        if self._flagged:
            os._exit(130)
        self._flagged = True
