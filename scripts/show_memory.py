"""Answer with a packed model inside a memory limit, and show how much of its file was read.

    hybrid pack MODEL --dtype int8 -o PACKED
    python scripts/show_memory.py PACKED --limit 512MiB

Needs Linux and the right to make a control group with the memory controller (version 1 or 2), which root has. The file
is first dropped from the page cache, so that what is there after the answer is what the answer read. Where the limit is
smaller than that, pages were read, dropped and read again: the bytes from the disk count each time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from hybrid.console import details, percent, size
from hybrid.formats.packed import PACKED_FILE, PackedModel
from placement.plan import parse_size
from profiler.common.errors import HybridError, InputError
from profiler.common.spec import STRATEGIES

_ROOT = Path("/sys/fs/cgroup")
_VERSION_1, _VERSION_2 = "memory.limit_in_bytes", "memory.max"


@contextlib.contextmanager
def limited_group(limit: int) -> Iterator[Path]:
    """Make a control group of at most `limit` bytes, page cache included. Raises `InputError` where there is none."""
    parent = next((p for p in (_ROOT / "memory", _ROOT) if (p / "cgroup.procs").exists()), _ROOT)
    group = parent / f"hybrid-{os.getpid()}"
    try:
        group.mkdir()
        name = next((n for n in (_VERSION_1, _VERSION_2) if (group / n).exists()), None)
        if name is None:
            raise OSError("it has no memory controller")
        (group / name).write_text(str(limit))
        yield group
    except OSError as error:
        raise InputError(
            f"cannot limit memory by a control group in {parent} ({error}); run as root on Linux"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


class Watch(threading.Thread):
    """Looks at a process until `close`: the most of each figure that was seen, in bytes."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.seen, self._process, self._closed = dict.fromkeys(("VmRSS", "RssAnon", "read_bytes"), 0), process, False
        self.start()

    def run(self) -> None:
        while not self._closed:
            self.look()
            time.sleep(0.02)

    def look(self) -> int:
        """Look now; returns the bytes read from the disk so far. A process that has ended shows nothing new."""
        with contextlib.suppress(OSError, ValueError):
            for name, unit in (("status", 1024), ("io", 1)):
                for line in Path(f"/proc/{self._process}/{name}").read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in self.seen:
                        self.seen[key] = max(self.seen[key], unit * int(value.split()[0]))
        return self.seen["read_bytes"]

    def close(self) -> None:
        self._closed = True
        self.join()


@dataclass(frozen=True)
class Usage:
    """Bytes read from the disk up to the first text and in all; seconds likewise; peak bytes of memory."""

    first_read: int
    read: int
    first_seconds: float
    seconds: float
    peak: int
    peak_anonymous: int


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answer(command: list[str], group: Path) -> Usage:
    """Run `command` in `group`, showing its text. Raises `HybridError` when it fails."""
    start = time.monotonic()
    enter = f'echo $$ > {group / "cgroup.procs"} && exec "$@"'
    with subprocess.Popen(["sh", "-c", enter, "sh", *command], stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None
        watch = Watch(child.pid)
        text = child.stdout.read(1)
        first_read, first_seconds = watch.look(), time.monotonic() - start
        while text:
            click.echo(text, nl=False)
            text = child.stdout.read(4096)
        seconds = time.monotonic() - start
        watch.close()
    if child.returncode != 0:
        raise HybridError(f"hybrid ended with code {child.returncode}; too low a --limit leaves Python no room")
    seen = watch.seen
    return Usage(first_read, seen["read_bytes"], first_seconds, seconds, seen["VmRSS"], seen["RssAnon"])


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--limit", default="512MiB", show_default=True, help="Of all memory, page cache included.")
@click.option("-p", "--prompt", default="a", show_default=True)
@click.option("--tokens", type=int, default=32, show_default=True)
@click.option(
    "--sparsity",
    type=click.Choice(["auto", *STRATEGIES]),
    default="auto",
    show_default=True,
)
@click.option("--context", type=int, default=256, show_default=True)
def main(model: Path, limit: str, prompt: str, tokens: int, sparsity: str, context: int) -> None:
    """Command line of this script."""
    try:
        packed, total = PackedModel.open(model), (model / PACKED_FILE).stat().st_size
        command = [sys.executable, "-m", "hybrid", "generate", str(model), "-p", prompt, "--temperature", "0"]
        command += ["--max-new-tokens", str(tokens), "--sparsity", sparsity, "--context", str(context)]
        drop_from_cache(model / PACKED_FILE)
        before = packed.resident_share()
        with limited_group(parse_size(limit)) as group:
            usage = answer(command, group)
            after = packed.resident_share()
    except HybridError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(details(str(model), report(usage, total, parse_size(limit), tokens, before, after)), err=True)


def report(usage: Usage, total: int, limit: int, tokens: int, before: float, after: float) -> list[tuple[str, str]]:
    """Names and values for people; `before` and `after` are the shares of the file in memory."""
    later = max(1, tokens - 1)
    per_token = (usage.read - usage.first_read) / later
    seconds = (usage.seconds - usage.first_seconds) / later
    return [
        ("file", f"{size(total)}, {total / limit:.1f} times the limit of {size(limit)}"),
        ("of it in memory", f"{percent(before)} before, {percent(after)} after"),
        ("up to the first token", f"{usage.first_seconds:.1f} s, {size(usage.first_read)} read from disk"),
        (
            "each token after it",
            f"{seconds:.2f} s, {size(round(per_token))} read, {percent(per_token / total)} of the file",
        ),
        ("peak memory", f"{size(usage.peak)}, of which not mapped from files {size(usage.peak_anonymous)}"),
    ]


if __name__ == "__main__":
    main()
