"""A chat model and a terminal without a model or a terminal, for the tests of the REPL.

Run as a program it is the whole REPL over the fake model; the terminal tests start it under a pseudo-terminal or a
pipe.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from hybrid.chat.protocols import Style
from hybrid.chat.repl import run_repl
from hybrid.chat.terminal import open_terminal
from hybrid.errors import HybridError
from hybrid.generation import FinishReason, GenerationStats, GenerationStep, SamplingSettings

Messages = list[dict[str, str]]


class FakeModel:
    """Answers `echo: MESSAGE` word by word; one token per word, and per message one more for its role.

    Some messages make it behave: `fail` raises after one word, `silent` ends without text, `interrupt` raises
    KeyboardInterrupt after two words, `hang` before the first, and `slow` goes on until it is stopped. Prompts are read
    in pieces of 10 tokens.
    """

    def __init__(self, context: int = 1000, pause: float = 0.0) -> None:
        self.context = context
        self.prompts: list[Messages] = []
        self.settings: list[SamplingSettings] = []
        self.resets = 0
        self.closed = 0
        self._pause = pause

    def count_tokens(self, messages: Messages) -> int:
        return sum(1 + len(message["content"].split()) for message in messages)

    def describe_placement(self) -> str:
        return "all hot\nno cold"

    def reset(self) -> None:
        self.resets += 1

    def reply(
        self, messages: Messages, settings: SamplingSettings, progress: Callable[[int, int], None]
    ) -> Generator[GenerationStep, None, None]:
        self.prompts.append(messages)
        self.settings.append(settings)
        try:
            self._read_prompt(self.count_tokens(messages), progress)
            yield from self._steps(messages, settings)
        finally:
            self.closed += 1

    def _read_prompt(self, tokens: int, progress: Callable[[int, int], None]) -> None:
        for done in range(0, tokens, 10):
            progress(done, tokens)
            time.sleep(self._pause)
        progress(tokens, tokens)

    def _steps(self, messages: Messages, settings: SamplingSettings) -> Generator[GenerationStep, None, None]:
        question = messages[-1]["content"]
        prompt = self.count_tokens(messages)
        room = self.context - prompt
        if question == "hang":
            raise KeyboardInterrupt
        words = ["no"] * 10_000 if question == "slow" else ["echo:", *question.split()]
        words += ["never"] * (question == "interrupt")
        words = [""] if question == "silent" else words
        for index, word in enumerate(words):
            count = index + 1
            if question == "fail" and count == 2:
                raise HybridError("the CPU workers died; start again")
            if question == "interrupt" and count == 3:
                raise KeyboardInterrupt
            ends: list[tuple[bool, FinishReason]] = [
                (count == len(words), "stop"),
                (count == settings.max_new_tokens, "length"),
                (count == room, "context"),
            ]
            finish = next((reason for reached, reason in ends if reached), None)
            stats = GenerationStats(prompt, 0, count, 0.25, index * 0.5, 0.125, 0.75, 0.1, 0.2, 0.3)
            yield GenerationStep(word if index == 0 else " " + word, index, stats, finish)
            if finish:
                return
            time.sleep(self._pause)


class ScriptedTerminal:
    """Feeds lines to the loop and keeps what it shows; an exception among the lines is raised by `read`."""

    def __init__(self, lines: Iterable[str | BaseException], interactive: bool = True) -> None:
        self.interactive = interactive
        self.answers = ""
        self.columns: int | None = None
        self.shown: list[tuple[Style, str]] = []
        self.statuses: list[str] = []
        self.on_write: Callable[[str], None] = lambda text: None
        self._lines = deque(lines)

    def read(self) -> str:
        line = self._lines.popleft() if self._lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.answers += text
        self.on_write(text)

    def line(self, text: str, style: Style) -> None:
        self.shown.append((style, text))

    def status(self, text: str) -> None:
        self.statuses.append(text)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def of(self, style: Style) -> list[str]:
        """The lines shown in `style`, in order."""
        return [text for shown, text in self.shown if shown == style]


def chat(
    *lines: str | BaseException,
    model: FakeModel | None = None,
    interactive: bool = True,
    system: str | None = None,
    **settings: Any,
) -> tuple[FakeModel, ScriptedTerminal]:
    """Run the loop over `lines`; returns the model and the terminal, which say what happened."""
    model = model or FakeModel()
    terminal = ScriptedTerminal(lines, interactive)
    run_repl(model, terminal, SamplingSettings(**settings), system)
    return model, terminal


def contents(messages: Messages) -> list[str]:
    """The texts of a prompt's messages."""
    return [message["content"] for message in messages]


if __name__ == "__main__":
    run_repl(
        FakeModel(context=60, pause=0.02), open_terminal(), SamplingSettings(max_new_tokens=500), header="fake model"
    )
