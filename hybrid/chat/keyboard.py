"""The keyboard while nothing is read from it: what is typed is not shown in the middle of an answer, and not lost."""

from __future__ import annotations

import contextlib
import signal
import termios
from collections.abc import Callable, Iterator
from types import FrameType

_LFLAG, _CC = 3, 6  # places in what tcgetattr gives


@contextlib.contextmanager
def quiet_keyboard(keyboard: int, mark_pastes: Callable[[bool], None]) -> Iterator[None]:
    """Inside, keys pressed at the terminal `keyboard` are not shown but kept for who reads next; Ctrl-C is a signal.

    `mark_pastes(True)` has the terminal mark what is pasted, `mark_pastes(False)` ends that. The shell has the terminal
    as it was after the block, while Ctrl-Z stops the program, and when it is killed by SIGTERM.
    """
    before, quiet = termios.tcgetattr(keyboard), termios.tcgetattr(keyboard)
    quiet[_LFLAG] &= ~(termios.ECHO | termios.ICANON)
    quiet[_CC][termios.VMIN] = 1

    def begin() -> None:
        termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
        mark_pastes(True)

    def end() -> None:
        mark_pastes(False)
        termios.tcsetattr(keyboard, termios.TCSANOW, before)

    def on_signal(number: int, frame: FrameType | None) -> None:
        end()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # from Ctrl-Z it comes back, when the shell lets the program go on
        signal.signal(number, on_signal)
        begin()

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTSTP, signal.SIGTERM)}
    begin()
    try:
        yield
    finally:
        end()
        for number, handler in handlers.items():
            signal.signal(number, handler)
