"""How long work tells how far it is. The command line draws it; whoever does the work only counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A piece of work of `total` units, of which `done` were there before it began."""

    def __call__(
        self, label: str, total: int, unit: str = "token", done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """What is entered is called with units done since its last call."""


@contextmanager
def no_progress(label: str, total: int, unit: str = "token", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Tells nothing."""
    yield lambda count: None
