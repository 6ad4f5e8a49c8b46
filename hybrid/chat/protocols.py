"""What the chat loop needs of a model and of a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Literal, Protocol

from hybrid.generation import GenerationStep, SamplingSettings

Style = Literal["info", "notice", "error"]


class ChatModel(Protocol):
    """What the loop needs of a model."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""

    def reply(
        self,
        messages: list[dict[str, str]],
        settings: SamplingSettings,
        progress: Callable[[int, int], None],
    ) -> Generator[GenerationStep, None, None]:
        """Stream the answer to `messages`, reusing the KV cache of the common prefix with the call before.

        `progress(done, total)` follows the reading of the prompt, in tokens that were not in the cache.
        Any exception inside the generator, KeyboardInterrupt included, and closing it must leave the model usable.
        """

    def count_tokens(self, messages: list[dict[str, str]]) -> int:
        """Tokens of the prompt that `reply` would make of `messages`."""

    def describe_placement(self) -> str:
        """The placement in use, as text of one or more lines."""

    def reset(self) -> None:
        """Drop the KV cache."""


class Terminal(Protocol):
    """What the loop needs of a terminal. `interactive` tells whether a person is there to be asked again."""

    interactive: bool

    @property
    def columns(self) -> int | None:
        """The width of the window that notices are shown in; None where they are shown in none."""

    def read(self) -> str:
        """The next message or command; raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""

    def write(self, text: str) -> None:
        """Show a piece of an answer at once."""

    def line(self, text: str, style: Style) -> None:
        """Show whole lines: `info` was asked for, a `notice` was not, an `error` tells why nothing was done."""

    def status(self, text: str) -> None:
        """Show a line that the next thing shown replaces; an empty one removes it."""

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what is typed while nothing is read is not shown, and is there for the next `read`."""
