"""How the chat reads and draws: prompt_toolkit where a person sits at a terminal, plain lines where input is piped.

Colour follows NO_COLOR and TERM=dumb; nothing else here looks at the environment but the place of the history file.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from hybrid.chat.keyboard import quiet_keyboard
from hybrid.chat.protocols import Style, Terminal
from hybrid.chat.repl import COMMANDS, SETTINGS
from hybrid.chat.screen import DIM, RED, Screen
from hybrid.errors import InputError

_ESCAPES: Mapping[Style, str] = {"info": "", "notice": DIM, "error": RED}


def open_terminal() -> Terminal:
    """The terminal of this process: `PromptTerminal` when both stdin and stdout are one, else `PlainTerminal`."""
    out = Screen(sys.stdout, os.environ)
    if sys.stdin.isatty() and sys.stdout.isatty():
        return PromptTerminal(out, open_history(os.environ))
    return PlainTerminal(sys.stdin.buffer, out, Screen(sys.stderr, os.environ))


class PlainTerminal:
    """One message per line of `source`; answers and what was asked for go to `out`, notices and errors to `err`."""

    interactive = False

    def __init__(self, source: BinaryIO, out: Screen, err: Screen) -> None:
        self._source = source
        self._out = out
        self._err = err
        self._mark = codecs.BOM_UTF8  # some editors and shells put it before the first line

    @property
    def columns(self) -> int | None:
        """The width of the window that notices are shown in, if they are."""
        return self._err.columns

    def read(self) -> str:
        """The next line without its end; raises EOFError, and `InputError` for a line that is not UTF-8."""
        line = self._source.readline()
        if not line:
            raise EOFError
        line, self._mark = line.removeprefix(self._mark), b""
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"a line of the input is not UTF-8 text (byte {error.start}); it is skipped") from error

    def write(self, text: str) -> None:
        """Write a piece of an answer to `out`, at once."""
        self._err.status("")
        self._out.write(text)

    def line(self, text: str, style: Style) -> None:
        """Write whole lines, `info` to `out` and the rest to `err`."""
        self._err.status("")
        (self._out if style == "info" else self._err).line(text)

    def status(self, text: str) -> None:
        """Show on `err`, where that is a terminal, a line that the next thing shown replaces."""
        self._err.status(text)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to keep from being shown: nobody types here."""
        return contextlib.nullcontext()


class PromptTerminal:
    """Line editing, history and completion by prompt_toolkit; answers go straight to `screen`."""

    interactive = True

    def __init__(self, screen: Screen, history: History) -> None:
        self._screen = screen
        self._session: PromptSession[str] = PromptSession(
            "> ",
            prompt_continuation=". ",
            multiline=True,
            history=history,
            key_bindings=_key_bindings(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
        )

    @property
    def columns(self) -> int | None:
        """The window's width now."""
        return self._screen.columns

    def read(self) -> str:
        """What the user sends, of one or more lines; raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        text = self._session.prompt()
        self._mark_pastes(True)  # the prompt has switched it off
        # Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes.
        return text.encode("utf-8", "replace").decode("utf-8")

    def write(self, text: str) -> None:
        """Show a piece of an answer at once, without the control characters in it."""
        self._screen.write(text)

    def line(self, text: str, style: Style) -> None:
        """Show whole lines, dim for a notice and red for an error where colour is on."""
        self._screen.line(text, _ESCAPES[style])

    def status(self, text: str) -> None:
        """Show a line that the next thing shown replaces."""
        self._screen.status(text)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Inside, keys pressed while nothing is read are not shown but kept for the next `read`; Ctrl-C is a signal."""
        return quiet_keyboard(self._session.input.fileno(), self._mark_pastes)

    def _mark_pastes(self, wanted: bool) -> None:
        """Have the terminal mark what is pasted, so that lines pasted during an answer are one message to look over."""
        if self._screen.knows_escapes:
            output = self._session.output
            (output.enable_bracketed_paste if wanted else output.disable_bracketed_paste)()
            output.flush()


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")  # typed before the prompt was there
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return bindings


class CommandCompleter(Completer):
    """Completes command names, file paths after commands that take a FILE, and setting names after /set."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions at the end of a command being typed; none inside a message."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        word, space, argument = text[1:].partition(" ")
        if not space:
            yield from _matching(COMMANDS, word)
        elif word == "set":
            yield from _matching(SETTINGS, argument)
        elif word in COMMANDS and COMMANDS[word].argument == "FILE":
            argument = argument.lstrip()
            yield from self._paths.get_completions(Document(argument, len(argument)), complete_event)


def _matching(names: Iterable[str], start: str) -> Iterable[Completion]:
    for name in names:
        if name.startswith(start):
            yield Completion(name + " ", start_position=-len(start), display=name)


class _ForgivingHistory(FileHistory):
    """A history file whose disk may fill up: the line is then only remembered in memory."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:
            return


def open_history(environment: Mapping[str, str]) -> History:
    """The history kept in `hybrid/history` of the user's data folder, or in memory where that cannot be written."""
    try:
        data = Path(environment.get("XDG_DATA_HOME", ""))
        # The XDG specification has relative paths ignored.
        path = (data if data.is_absolute() else Path.home() / ".local" / "share") / "hybrid" / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("r+b"):
            return _ForgivingHistory(str(path))
    except (OSError, RuntimeError):
        return InMemoryHistory()
