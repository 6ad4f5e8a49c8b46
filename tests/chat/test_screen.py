"""What a person sees of a stream, at a pseudo-terminal of a given width; and that a stream to a file gets all of it."""

import io
import os
import termios
import tty

import pytest

from hybrid.chat.screen import DIM, Screen, is_dumb, reading, use_colour


class Window:
    """A pseudo-terminal: `stream` to write to, and what it was sent."""

    def __init__(self, columns: int) -> None:
        self._keyboard, terminal = os.openpty()
        tty.setraw(terminal)
        self.stream = open(terminal, "w", encoding="utf-8")  # noqa: SIM115 - closed by the fixture
        self.resize(columns)

    def resize(self, columns: int) -> None:
        termios.tcsetwinsize(self.stream.fileno(), (24, columns))

    def sent(self) -> str:
        """What came since the last call."""
        self.stream.write("\0")
        self.stream.flush()
        sent = b""
        while not sent.endswith(b"\0"):
            sent += os.read(self._keyboard, 65536)
        return sent.decode().removesuffix("\0")

    def close(self) -> None:
        self.stream.close()
        os.close(self._keyboard)


@pytest.fixture
def window():
    made = Window(20)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("variables", "colour", "dumb"),
    [
        ({}, True, False),
        ({"NO_COLOR": ""}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, True),
        ({"TERM": "unknown"}, False, True),
        ({"TERM": "xterm"}, True, False),
    ],
)
def test_colour_follows_the_environment(variables, colour, dumb):
    assert use_colour(variables) is colour
    assert is_dumb(variables) is dumb


@pytest.mark.parametrize(("variables", "line"), [({}, "\x1b[2mdone\x1b[0m\n"), ({"NO_COLOR": "1"}, "done\n")])
def test_colour_changes_nothing_but_escapes_and_a_model_cannot_send_any(window, variables, line):
    screen = Screen(window.stream, variables)
    screen.line("done", DIM)
    screen.write("a\x1b[2J\tb\r\n\x9b\x07\n")
    screen.line("x\x1by")
    assert window.sent() == line + "a\ufffd[2J   b\n\ufffd\ufffd\n" + "x\ufffdy\n"


def test_answers_and_lines_are_wrapped_in_the_window_as_it_is(window):
    screen = Screen(window.stream, {})
    for piece in ("a few words ", "reach", " the edge", "\n"):
        screen.write(piece)
    screen.line("error: as long as this", DIM)
    assert window.sent() == "a few words reach\nthe edge\n\x1b[2merror: as long as\nthis\x1b[0m\n"
    window.resize(10)
    assert screen.columns == 10
    screen.line("a few words")
    assert window.sent() == "a few\nwords\n"


def test_a_window_that_does_not_tell_its_width_wraps_nothing(window):
    window.resize(0)
    screen = Screen(window.stream, {})
    assert screen.columns is None
    screen.line("word " * 30)
    assert window.sent() == ("word " * 30).rstrip() + "\n"


def test_a_status_is_replaced_by_the_next_one_or_by_what_is_shown(window):
    screen = Screen(window.stream, {"NO_COLOR": "1"})
    screen.status("read: 1 of 2")
    screen.status("read: 1 of 2")
    screen.status("wider than the window of 20")
    screen.write("answer\n")
    screen.status("")
    screen.status("again")
    screen.line("line")
    erase = "\r\x1b[K"
    assert window.sent() == f"{erase}read: 1 of 2{erase}wider than the wind{erase}answer\n{erase}again{erase}line\n"


def test_a_dumb_terminal_has_no_status_but_whole_words(window):
    screen = Screen(window.stream, {"TERM": "dumb"})
    screen.status("reading")
    screen.line("a few words reach the edge", DIM)
    assert window.sent() == "a few words reach\nthe edge\n"


def test_a_stream_that_is_no_terminal_gets_the_text_as_it_is():
    out = io.StringIO()
    screen = Screen(out, {})
    screen.status("reading")
    screen.write("a\x1b[2J\tword " * 30)
    screen.line("\x07", DIM)
    assert screen.columns is None
    assert out.getvalue() == "a\x1b[2J\tword " * 30 + "\x07\n"


def test_a_stream_that_lacks_a_character_shows_a_question_mark():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Screen(out, {}).write("a\u00e4b")
    assert out.buffer.getvalue() == b"a?b"


def test_how_far_a_prompt_is_read():
    assert reading(0, 1234) == "reading the prompt: 0 of 1,234 tokens"
    assert reading(1234, 1234) == ""
