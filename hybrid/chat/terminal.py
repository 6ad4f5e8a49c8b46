"""How the chat is drawn: prompt_toolkit where a person sits at a terminal, plain lines where input is piped.

Colour follows NO_COLOR and TERM=dumb; nothing else here looks at the environment but the place of the history file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle

from hybrid.chat.repl import COMMANDS, Style, Terminal
from hybrid.errors import InputError
from hybrid.generation import SamplingSettings

_ESCAPES: Mapping[Style, str] = {"info": "", "notice": "\x1b[2m", "error": "\x1b[31m"}
_RESET = "\x1b[0m"

# Control characters that a model may emit and that would move the cursor or worse; newline and tab stay.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {ord("\r"): None}


def open_terminal() -> Terminal:
    """The terminal of this process: `PromptTerminal` when both stdin and stdout are one, else `PlainTerminal`."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return PromptTerminal(sys.stdout, open_history(os.environ), colour=use_colour(os.environ))
    return PlainTerminal(sys.stdin.buffer, sys.stdout, sys.stderr)


def use_colour(environment: Mapping[str, str]) -> bool:
    """False where NO_COLOR is set and not empty (no-color.org), or TERM is `dumb`."""
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


class PlainTerminal:
    """One message per line of `source`; answers and what was asked for go to `out`, notices and errors to `err`."""

    interactive = False

    def __init__(self, source: BinaryIO, out: TextIO, err: TextIO) -> None:
        self._source = source
        self._out = out
        self._err = err

    def read(self) -> str:
        """The next line without its end; raises EOFError, and `InputError` for a line that is not UTF-8."""
        line = self._source.readline()
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"a line of the input is not UTF-8 text (byte {error.start}); it is skipped") from error

    def write(self, text: str) -> None:
        """Write a piece of an answer to `out`, at once."""
        _put(self._out, text)

    def line(self, text: str, style: Style) -> None:
        """Write whole lines, `info` to `out` and the rest to `err`."""
        _put(self._out if style == "info" else self._err, text + "\n")


class PromptTerminal:
    """Line editing, history and completion by prompt_toolkit; answers go straight to `out`.

    `source` and `display` replace the process's own terminal in tests.
    """

    interactive = True

    def __init__(
        self,
        out: TextIO,
        history: History,
        colour: bool,
        source: Input | None = None,
        display: Output | None = None,
    ) -> None:
        self._out = out
        self._colour = colour
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
            input=source,
            output=display,
        )

    def read(self) -> str:
        """What the user sends, of one or more lines; raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        # Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes.
        return self._session.prompt().encode("utf-8", "replace").decode("utf-8")

    def write(self, text: str) -> None:
        """Show a piece of an answer at once, without the control characters in it."""
        _put(self._out, text.translate(_CONTROLS))

    def line(self, text: str, style: Style) -> None:
        """Show whole lines, dim for a notice and red for an error where colour is on."""
        shown = text.translate(_CONTROLS)
        escape = _ESCAPES[style] if self._colour else ""
        _put(self._out, f"{escape}{shown}{_RESET}\n" if escape else f"{shown}\n")


def _put(stream: TextIO, text: str) -> None:
    # A locale without UTF-8 must not end the chat: what it lacks becomes a question mark.
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


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
            yield from _matching(SamplingSettings.names(), argument)
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
