"""A folder that is there whole or not at all, and copies that are made only where something changed."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hybrid.console import size
from hybrid.errors import InputError
from profiler.common.artifact import atomic_write


@contextlib.contextmanager
def new_folder(path: Path, needed: int, option: str = "-o", replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; once the block ends without error it takes the place of `path`.

    What an earlier, killed call left is removed first. option: what a user names another folder with. Raises
    `InputError` when the disk has less than `needed` bytes, the folder cannot be written, or `path` is not new and not
    to be replaced.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise InputError(f"{path} needs {size(needed)}, {size(free)} are free there; choose another with {option}")
        temporary = _temporary(path)
        with _locked(temporary):
            yield temporary
            _sync(temporary)
            temporary.chmod(0o755)
            if replaces:
                _move_away(path)
            temporary.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another with {option}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            _sweep(path)


def copy_if_changed(source: Path, target: Path) -> None:
    """Make `target` a copy of the file `source`, atomically. Raises `ArtifactError` when it cannot be written."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    with source.open("rb") as reader, atomic_write(target) as writer:
        shutil.copyfileobj(reader, writer)


def _temporary(path: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock that says that a process works in `folder`; False when another has it. A killed one has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(path: Path) -> None:
    """Remove temporary folders of `path` in which no process works."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.suffix == ".tmp" and left.is_dir():
            with _locked(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move_away(path: Path) -> None:
    """Put what is at `path` into a temporary folder of its own, which the next sweep removes."""
    if path.exists():
        path.rename(_temporary(path) / "replaced")
