"""Calls of tools in what a model writes: text in as it comes, text and calls out.

Two forms are known: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as many templates teach it, and an
answer that is such an object from its first character on.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BEGINNING = '{"name":"'
_LONGEST_HEAD = 512  # characters before the arguments, after which it is text


@dataclass(frozen=True)
class CallPiece:
    """A piece of call number `index`: its id and name with the first piece, then its arguments' JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class CallReader:
    """One answer, in pieces. What may yet become a call is held back."""

    def __init__(self, names: Collection[str]) -> None:
        """names: of the tools that may be called; with none, everything is text."""
        self._names, self._held = names, ""
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._has_text = self._is_wrapped = False
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """The text to show and the pieces of calls, now that `text` came."""
        self._held += text
        shown, pieces = "", list[CallPiece]()
        if not self._names:
            return self._take(len(self._held)), pieces
        steps = {"text": self._read_text, "head": self._read_head, "arguments": self._read_arguments}
        while True:
            before = (self._state, len(self._held))
            found = steps.get(self._state, self._read_tail)()
            if isinstance(found, str):
                shown += found
            elif found is not None:
                pieces.append(found)
            if before == (self._state, len(self._held)):
                return shown, pieces

    def rest(self) -> str:
        """The text that is still held back when the answer ends."""
        wanted = self._state in ("text", "head")
        held = self._take(len(self._held))
        return (OPEN if self._state == "head" and self._is_wrapped else "") + held if wanted else ""

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _read_text(self) -> str | None:
        at = self._held.find(OPEN)
        start = self._held.lstrip()
        if not self._has_text and at != len(self._held) - len(start) and (start[:1] == "{" or not start):
            self._state, self._is_wrapped = ("head" if start else "text"), False
            return None
        if at >= 0:
            before = self._take(at)
            self._take(len(OPEN))
            self._state, self._is_wrapped = "head", True
            return before if before.strip() else None
        kept = max((n for n in range(1, len(OPEN)) if self._held.endswith(OPEN[:n])), default=0)
        shown = self._take(len(self._held) - kept)
        self._has_text = self._has_text or bool(shown.strip())
        return shown

    def _read_head(self) -> str | CallPiece | None:
        found = _HEAD.match(self._held)
        if found and found[1] in self._names:
            self._take(found.end())
            self._state, self._depth, self._in_string, self._escaped = "arguments", 0, False, False
            self.calls += 1
            return CallPiece(self.calls - 1, id=f"call_{uuid.uuid4().hex[:24]}", name=found[1])
        begun = re.sub(r"\s", "", self._held)[: len(_BEGINNING)]
        if not found and _BEGINNING.startswith(begun) and len(self._held) < _LONGEST_HEAD:
            return None
        self._state, self._has_text = "text", True
        return OPEN if self._is_wrapped else ""

    def _read_arguments(self) -> CallPiece | None:
        for at, character in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0:
                    self._state = "tail"
                    return CallPiece(self.calls - 1, self._take(at + 1))
        return CallPiece(self.calls - 1, self._take(len(self._held))) if self._held else None

    def _read_tail(self) -> None:
        """What closes a call is not shown; after a wrapped one, all up to the mark."""
        end = self._held.find(CLOSE if self._is_wrapped else "}")
        if end >= 0:
            self._take(end + (len(CLOSE) if self._is_wrapped else 1))
            self._state = "text"
