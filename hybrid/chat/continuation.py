"""One text continued for `hybrid generate`: the text to one stream, notes and statistics to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hybrid.chat.repl import early_end
from hybrid.chat.screen import Screen, reading
from hybrid.generation import GenerationStep, SamplingSettings


def show_continuation(
    start: Callable[[Callable[[int, int], None]], Iterator[GenerationStep]],
    settings: SamplingSettings,
    context: int,
    out: Screen,
    err: Screen,
) -> None:
    """Show on `out` what `start(progress)` yields, as it comes, and on `err` how it ended and how fast it was.

    Whatever ends it early, a line that was begun is ended. `context` and `settings` are those that bound the text.
    """
    text, last = "", None
    try:
        for last in start(lambda done, total: err.status(reading(done, total))):
            err.status("")
            out.write(last.text)
            text += last.text
    finally:
        err.status("")
        if last is not None:
            out.write("\n")
    if last is not None:
        empty = "" if text.strip() else "the continuation is empty"
        early = early_end(last.finish, settings, context)
        for line in filter(None, (empty, early, last.stats.summary(err.columns), last.stats.times())):
            err.line(line)
