"""Options that several commands have, and the types that check what is given.

Everything that can be said of an option's value alone is said here, before what the commands need is imported: that
takes seconds. What checks a value is the function that reads it later; only its import is put off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from hybrid.errors import InputError
from hybrid.formats.folder import require_model, require_writable
from hybrid.generation import SamplingSettings

Command = TypeVar("Command", bound=Callable[..., Any])


class Checked(click.ParamType):
    """Text that `check` takes; its `InputError` becomes one that names the option."""

    def __init__(self, name: str, check: Callable[[str], object]) -> None:
        self.name, self._check = name, check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value`, unchanged."""
        try:
            self._check(value)
        except InputError as error:
            self.fail(str(error), param, ctx)
        return value


class ReadablePath(click.Path):
    """A file or folder that is there."""

    def __init__(self, folders: bool = False, word: str = "") -> None:
        """folders: whether one will do. word: what may stand for a path, such as `-` for stdin."""
        super().__init__(path_type=Path, dir_okay=folders)
        self._word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Its `Path`."""
        if value == self._word:
            return Path(value)
        try:
            os.stat(value)
        except FileNotFoundError:
            self.fail(f"{os.fspath(value)} does not exist", param, ctx)
        except (OSError, ValueError) as error:  # a ValueError for a NUL character
            self.fail(f"{os.fspath(value)!r} cannot be used: {getattr(error, 'strerror', error)}", param, ctx)
        return super().convert(value, param, ctx)


class NewPath(click.Path):
    """A file or folder to write; what is there may be replaced."""

    def __init__(self, folder: bool = True) -> None:
        """folder: whether it may be one."""
        super().__init__(path_type=Path, dir_okay=folder)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Its `Path`."""
        path = Path(value)
        try:
            require_writable(path.parent)
        except InputError as error:
            self.fail(str(error), param, ctx)
        if path.exists() and not (path.is_file() or path.is_dir()):
            self.fail(f"{path} is a device, not a file; name another", param, ctx)
        if path.is_file() and not os.access(path, os.W_OK):
            self.fail(f"cannot write {path}; name another", param, ctx)
        return super().convert(value, param, ctx)


class ModelPath(click.Path):
    """The folder of a model, or its GGUF file."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Its `Path`."""
        path = Path(value)
        try:
            require_model(path)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from error
        return path


def check_size(text: str) -> None:
    """Raise `BudgetError` for what is not a size of memory."""
    from profiler.common.sizes import parse_size

    parse_size(text)


def check_target(text: str) -> None:
    """Raise `InputError` for what is not a perplexity increase."""
    from predictor.target import PredictorTarget

    PredictorTarget.parse(text)


def check_strategies(text: str) -> None:
    """Raise `InputError` for what is not a list of different strategies."""
    known, names = ("dense", "exact", "learned", "certified", "proxy"), text.split(",")
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise InputError(f"{text!r} is no list of different ones of {', '.join(known)}")
    if {"learned", "certified"} <= set(names):
        raise InputError("learned and certified are not loaded together; measure one after the other")


_SIZE = Checked("size", check_size)
COUNT = click.IntRange(min=1)
PATH = click.Path(path_type=Path)

MODEL = click.argument("model", required=False, type=ModelPath())
BUNDLE = click.option(
    "--bundle", type=PATH, help="Folder of the artefacts  [default: MODEL/hybrid, or NAME.hybrid beside NAME.gguf]"
)
CORPUS = click.option(
    "--corpus",
    multiple=True,
    type=ReadablePath(folders=True),
    metavar="FILE...",
    help="Text files, .jsonl files or folders. The embedded model has its own.",
)
SKIP_BAD = click.option("--skip-bad", is_flag=True, help="Leave out and count documents that cannot be used.")
THREADS = click.option("--threads", type=COUNT, help="CPU threads  [default: all that this process may use]")
SPARSITY = click.option(
    "--sparsity",
    type=click.Choice(["auto", "dense", "exact", "learned", "certified", "proxy"]),
    default="auto",
    show_default=True,
    help="auto: certified or learned, as prepared, until then exact; of SiLU and GELU proxy, until then dense.",
)
KV = click.option(
    "--kv",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="How keys and values are kept: auto is f16, or f32 where that does not hold them.",
)
PREFILL = click.option(
    "--prefill",
    type=click.Choice(["auto", "fast", "precise"]),
    default="auto",
    show_default=True,
    help="How a prompt's tokens are multiplied: fast, which is auto, in 11 to 22 bits; precise, in f32.",
)
EVAL_PREFILL = click.option(
    "--prefill",
    type=click.Choice(["precise", "fast"]),
    default="precise",
    show_default=True,
    help="fast: also what reading prompts so costs.",
)
MLOCK = click.option("--mlock", is_flag=True, help="Read a packed model at once and keep it in memory.")
CONTEXT = click.option("--context", type=COUNT, help="Tokens of the KV cache  [default: the model's]")
HARDWARE = click.option(
    "--hardware",
    type=ReadablePath(word="default"),
    help="Hardware profile to plan for, or `default`, a 24 GB GPU  [default: this machine, measured once]",
)
BUDGET = click.option(
    "--vram-budget",
    type=_SIZE,
    default="unlimited",
    show_default=True,
    help="Such as 8GiB; unlimited takes what the GPU has.",
)
RUN_BUDGET = click.option(
    "--vram-budget",
    type=_SIZE,
    help="Bytes to take from the GPU, such as 8GiB or 0  [default: what the placement was made for]",
)
SOLVER = click.option(
    "--solver",
    type=click.Choice(["milp", "greedy"]),
    default="milp",
    show_default=True,
    help="milp is the better one; greedy is there to check it.",
)
TARGET = click.option(
    "--target",
    type=Checked("percent", check_target),
    default="0.5%",
    show_default=True,
    help="Perplexity increase that predictors, or proxies, may cost.",
)
TOKENS = click.option("--tokens", type=COUNT, default=100_000, show_default=True, help="Calibration tokens.")
OWN_TEXT = click.option(
    "--own-text",
    type=click.IntRange(0),
    metavar="COUNT",
    help="Tokens beside the corpus that the model continues itself  [default: a sixth of --tokens]",
)
SEED = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Makes what is drawn at random repeatable."
)
_LEAST_WINDOW = click.IntRange(2)
WINDOW = click.option(
    "--window", type=_LEAST_WINDOW, help="Tokens per window of the corpus  [default: 512, or the model's context]"
)
# What it was called in profile and eval, which have no KV cache to size.
WINDOW_AS_CONTEXT = click.option("--context", "window", type=_LEAST_WINDOW, hidden=True)

_SAMPLING = {
    "temperature": ("NUMBER", "0 always takes the most likely token."),
    "top-k": ("COUNT", "Keep this many of the most likely tokens; 0 is off."),
    "top-p": ("SHARE", "Keep the most likely tokens that make up this probability; 1 is off."),
    "min-p": ("SHARE", "Drop tokens below this share of the likeliest one's probability; 0 is off."),
    "repetition-penalty": ("NUMBER", "Above 1 makes tokens seen before less likely."),
    "seed": ("INTEGER", "Makes sampled answers repeatable."),
    "max-new-tokens": ("COUNT", "The longest answer."),
}


def sampling_options(command: Command) -> Command:
    """Sampling options; each is read by `SamplingSettings`, and has the model's own value by default."""
    for flag, (metavar, text) in reversed(_SAMPLING.items()):
        name = flag.replace("-", "_")
        kind = Checked(name, lambda value, name=name: SamplingSettings().with_value(name, value))  # type: ignore[misc]
        command = click.option(f"--{flag}", type=kind, metavar=metavar, help=text)(command)
    return click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")(command)


def chosen_sampling(defaults: SamplingSettings, given: Mapping[str, Any]) -> SamplingSettings:
    """The settings that `sampling_options` were given; `defaults` where they were not."""
    settings = replace(defaults, stop=tuple(given["stop"])) if given["stop"] else defaults
    for name in SamplingSettings.names():
        if name != "stop" and given[name] is not None:
            settings = settings.with_value(name, given[name])
    return settings


def run_options(command: Command) -> Command:
    """How a model is run."""
    for option in reversed((SPARSITY, RUN_BUDGET, CONTEXT, KV, PREFILL, THREADS, MLOCK, BUNDLE)):
        command = option(command)
    return command


_SECONDS = click.FloatRange(min=0)
API_KEY = click.option("--api-key", envvar="HYBRID_API_KEY", show_envvar=True, help="The server's key.")
_SERVER = (
    click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines ask."),
    click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 is any free one."),
    API_KEY,
    click.option("--cors", multiple=True, metavar="ORIGIN", help="Let this site's pages ask; may be repeated."),
    click.option("--kv-tokens", type=COUNT, help="Tokens of all sequences together  [default: what memory allows]"),
    click.option(
        "--max-pause",
        type=click.FloatRange(0, min_open=True),
        default=0.1,
        show_default=True,
        help="Seconds that reading a prompt may hold up others' tokens.",
    ),
    click.option("--max-running", type=COUNT, default=32, show_default=True, help="Answers made at once."),
    click.option("--max-waiting", type=COUNT, default=256, show_default=True, help="Requests that may wait."),
    click.option("--max-body", type=COUNT, default=8, show_default=True, help="MiB of a request."),
    click.option("--max-connections", type=COUNT, default=1024, show_default=True, help="Open at once."),
    click.option(
        "--grace", type=_SECONDS, default=5.0, show_default=True, help="Seconds for answers under way at the end."
    ),
)


def server_options(command: Command) -> Command:
    """Where a server listens and what it takes."""
    for option in reversed(_SERVER):
        command = option(command)
    return command


_EVAL = (
    click.option("--tokens", type=COUNT, default=16_384, show_default=True, help="Tokens to evaluate."),
    WINDOW,
    WINDOW_AS_CONTEXT,
    click.option("--curve", is_flag=True, help="Also sweep the predictors' thresholds."),
    click.option(
        "--answers",
        type=click.IntRange(0),
        default=0,
        metavar="COUNT",
        help="Also so many greedy answers: where they part from dense, and whether they get worse.",
    ),
    click.option("--answer-tokens", type=COUNT, default=200, show_default=True, help="Of each of them."),
    KV,
    EVAL_PREFILL,
)


def eval_options(command: Command) -> Command:
    """What is evaluated."""
    for option in reversed(_EVAL):
        command = option(command)
    return command


def repeat_corpus(arguments: list[str]) -> list[str]:
    """`--corpus a b` as `--corpus a --corpus b`, so that a shell's wildcard can follow the option."""
    expanded: list[str] = []
    in_corpus = False
    for argument in arguments:
        if argument.startswith("-"):
            in_corpus = argument == "--corpus"
        elif in_corpus and expanded[-1] != "--corpus":
            expanded.append("--corpus")
        expanded.append(argument)
    return expanded
