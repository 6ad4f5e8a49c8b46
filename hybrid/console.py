"""What commands print: tables, sizes and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click
from tqdm import tqdm


def size(count: int) -> str:
    """Bytes as a person reads them: `1.5 GiB`, `512 B`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text columns: the first aligned left, the others right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(w) if at == 0 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def details(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and under it names with what they are, both aligned left."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def counted(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@contextmanager
def compile_notice() -> Iterator[None]:
    """Inside, a line on stderr says why nothing happens when kernels have to be compiled; they are kept on disk."""
    if "numba" not in sys.modules:  # whoever has kernels has imported it by now
        yield
        return
    from numba.core import event

    class Notice(event.Listener):
        said = False

        def on_start(self, begun: Any) -> None:
            if not self.said:
                self.said = True
                tqdm.write("compiling kernels (once)", file=sys.stderr)

        def on_end(self, ended: Any) -> None:
            pass

    with event.install_listener("numba:compile", Notice()):
        yield


@contextmanager
def progress(label: str, total: int, unit: str = "token", done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and time left; where stderr is no terminal, a line per quarter.

    done: of `total`, what was there before; the rate is of what is done here.
    """
    if sys.stderr.isatty():
        look: dict[str, Any] = {"unit": unit, "unit_scale": unit != "layer", "dynamic_ncols": True, "file": sys.stderr}
        with tqdm(total=total, initial=done, desc=label, **look) as bar:
            yield lambda count: (bar.update(count), None)[1]
        return
    start, first = monotonic(), done
    kept = f", {done:,} of them kept" if done else ""
    click.echo(f"{label}: {counted(total, unit)}{kept}", err=True)

    def advance(count: int) -> None:
        nonlocal done
        quarter = 4 * done // max(1, total)
        done += count
        if quarter < 4 * done // max(1, total) < 4:
            click.echo(
                f"{label}: {done / total:.0%}, {_speed(done - first, total - done, monotonic() - start, unit)}",
                err=True,
            )

    yield advance
    click.echo(f"{label}: done in {monotonic() - start:.0f} s", err=True)


def _speed(done: int, left: int, seconds: float, unit: str) -> str:
    """Of `done` units in so many seconds: the time, the rate, and how long what is left will take."""
    rate = done / max(1e-3, seconds)
    amount = size(round(rate)) if unit == "byte" else f"{rate:{',.0f' if rate >= 10 else '.2g'}} {unit}s"
    return f"{seconds:.0f} s, {amount}/s, {left / rate:.0f} s left"
