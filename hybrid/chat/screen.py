"""A stream as a person in front of it needs it: whole words in the window, no control characters, a line of status.

A stream that is no terminal gets the text as it is, and no status.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TextIO

from prompt_toolkit.utils import is_dumb_terminal

from hybrid.chat.wrap import WordWrap

# Control characters that a model may emit and that would move the cursor or worse; newline and tab stay.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {ord("\r"): None}
DIM, RED = "\x1b[2m", "\x1b[31m"
_RESET, _ERASE = "\x1b[0m", "\r\x1b[K"


def use_colour(environment: Mapping[str, str]) -> bool:
    """False where NO_COLOR is set and not empty (no-color.org), or TERM names a terminal without escape sequences."""
    return not environment.get("NO_COLOR") and not is_dumb(environment)


def is_dumb(environment: Mapping[str, str]) -> bool:
    """True where TERM is `dumb` or `unknown`, as the prompt takes it: a terminal without escape sequences."""
    return is_dumb_terminal(environment.get("TERM", ""))


def reading(done: int, total: int) -> str:
    """The status while a prompt is read; empty once it is."""
    return f"reading the prompt: {done:,} of {total:,} tokens" if done < total else ""


class Screen:
    """Writes to `stream`; colour and the line of status follow NO_COLOR and TERM of `environment`."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str]) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._colour = self._is_terminal and use_colour(environment)
        self.knows_escapes = self._is_terminal and not is_dumb(environment)
        self._status = ""
        self._wrap = WordWrap()

    @property
    def columns(self) -> int | None:
        """The window's width now; None where the stream is no terminal or the terminal does not tell."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or None
        except (OSError, ValueError):
            return None

    def write(self, text: str) -> None:
        """Show a piece of an answer at once; a word near the edge may wait for its end, at the latest for a newline."""
        self.status("")
        self._put(self._wrap.push(text.translate(_CONTROLS), self.columns) if self._is_terminal else text)

    def line(self, text: str, escape: str = "") -> None:
        """Show whole lines, where colour is on after the sequence `escape`."""
        self.status("")
        if self._is_terminal:
            text = WordWrap().push(f"{text.translate(_CONTROLS)}\n", self.columns).removesuffix("\n")
        self._put(f"{escape}{text}{_RESET}\n" if escape and self._colour else f"{text}\n")

    def status(self, text: str) -> None:
        """Show a line that the next thing shown replaces; an empty one removes it. Nothing where none can be erased."""
        if not self.knows_escapes or text == self._status:
            return
        shown = text[: (self.columns or 80) - 1]  # a line of the full width could not be erased
        self._put(_ERASE + (f"{DIM}{shown}{_RESET}" if shown and self._colour else shown))
        self._status = text

    def _put(self, text: str) -> None:
        # A locale without UTF-8 must not end the chat: what it lacks becomes a question mark.
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()
