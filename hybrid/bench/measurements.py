"""What benchmarks record beside their numbers: machine, commit, date, spread; and the CSV that rows are added to."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import InputError
from profiler.common.artifact import package_version


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of several runs."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(float(value) for value in np.percentile(values, (20, 50, 80))))


def machine() -> str:
    """The CPU's name, as its maker gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "CPU"


def commit() -> str:
    """The source tree's commit, with `+` where files differ from it; the package's version where there is no tree."""
    folder = Path(__file__).parent
    try:
        found = _git(folder, "rev-parse", "--short", "HEAD")
        return found + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return package_version()


def _git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(call, capture_output=True, check=True, text=True).stdout.strip()


def origin() -> dict[str, str]:
    """The columns that begin every row: date in UTC, commit and machine."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit(), "machine": machine()}


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows, all with the same columns, to `path`, which is made where it is missing.

    Raises `InputError` when the file has other columns or cannot be written; it is then as before.
    """
    columns = list(rows[0])
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    try:
        known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if known and known[0].split(",") != columns:
            raise InputError(f"{path} has columns {known[0]}, expected {','.join(columns)}; give another file to --csv")
        if not known:
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        with path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot add rows to {path}: {error}; give another file to --csv") from error


def _cell(value: Any) -> Any:
    """Numbers with 6 significant digits, and nothing for what was not measured."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
