"""The process that a command runs in: its standard streams, Ctrl-C, and how it ends.

All of this is in place before anything else is imported, so nothing heavy may be imported here. What Ctrl-C does is
the handler that is set; there are three.

* While the program starts: it ends at once, in one word. An exception in the middle of an import leaves half a module
  behind, and some answer it with another error, or abort.
* While a command works: KeyboardInterrupt, so that what is done can be kept.
* After the first: the program ends at once, without a word.

Python runs a handler on the main thread once it is back from compiled code, which may take seconds: a matrix product, a
kernel that is compiled. So another thread reads of each Ctrl-C from a pipe, and ends the program after the second.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading

TYPE_CHECKING = False  # as `typing` has it, whose import takes longer than all others here
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130


def open_streams() -> None:
    """Standard streams that are closed become /dev/null; else a file opened later would get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for good; it gets the lowest free number


def take_ctrl_c() -> None:
    """From here on Ctrl-C ends the program; one that was started to ignore it, as by nohup, goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_with_a_word)
        source, sink = os.pipe()
        os.set_blocking(sink, False)
        signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(source,), daemon=True).start()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt; but a program that ignores it goes on doing so."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, _raise_once)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, _end)  # whoever raised it
        raise
    finally:
        if not interrupted():
            signal.signal(signal.SIGINT, before)


def interrupted() -> bool:
    """Whether Ctrl-C came while the command worked: what fails from then on fails for this reason."""
    return signal.getsignal(signal.SIGINT) is _end


def drop_output() -> None:
    """Write what is buffered; where it cannot be, or nobody reads it, forget it, or Python complains when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def leave(code: int) -> NoReturn:
    """End the process, without taking apart what was imported: that takes 0.7 s of CPU time with torch and Numba.

    Interrupted, threads may be in the middle of anything, and what waits for them at exit is left out too.
    """
    if code != INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
        atexit._run_exitfuncs()
    drop_output()
    os._exit(code)


def _watch(source: int) -> None:
    presses = 0
    while number := os.read(source, 1):
        if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) in (_raise_once, _end):
            presses += 1  # maybe of one that the main thread has seen already
        if presses > 1:
            os._exit(INTERRUPTED)


def _end_with_a_word(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _raise_once(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
