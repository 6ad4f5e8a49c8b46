"""A quiet keyboard shows and loses no key, and the terminal is as it was found when it ends, whatever ends it."""

import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hybrid.chat.keyboard import quiet_keyboard

PROGRAM = """
import signal
from hybrid.chat.keyboard import quiet_keyboard
with quiet_keyboard(0, lambda wanted: print(wanted, flush=True)):
    input()
    signal.raise_signal(signal.SIGTERM)
"""


@pytest.fixture
def keyboard():
    """Both ends of a pseudo-terminal: where keys are pressed, and where they are read."""
    ends = os.openpty()
    yield ends
    for end in ends:
        os.close(end)


def test_keys_are_kept_and_not_shown(keyboard):
    hand, terminal = keyboard
    before, handler, marks = termios.tcgetattr(terminal), signal.getsignal(signal.SIGTSTP), []
    with pytest.raises(ZeroDivisionError), quiet_keyboard(terminal, marks.append):
        os.write(hand, b"ab")
        assert os.read(terminal, 10) == b"ab"  # with no Enter after it
        raise ZeroDivisionError
    assert termios.tcgetattr(terminal) == before
    assert signal.getsignal(signal.SIGTSTP) is handler
    assert marks == [True, False]
    os.write(terminal, b"answer")
    assert os.read(hand, 10) == b"answer"


def test_a_killed_program_leaves_the_terminal_as_it_was(keyboard):
    hand, terminal = keyboard
    before = termios.tcgetattr(terminal)
    command, root = [sys.executable, "-c", PROGRAM], Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, text=True, cwd=root) as started:
        assert started.stdout.readline() == "True\n"
        assert not termios.tcgetattr(terminal)[3] & (termios.ECHO | termios.ICANON)
        os.write(hand, b"\n")
        assert started.stdout.read() == "False\n"
    assert started.returncode == -signal.SIGTERM
    assert termios.tcgetattr(terminal) == before
