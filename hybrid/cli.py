"""The `hybrid` command: parses, builds and prints. The work is in the package whose name a command bears.

Exit codes: 0 done, 2 bad usage or input, 1 a failure while running, 130 Ctrl-C. Errors are one line on stderr;
`hybrid --debug COMMAND` shows the traceback. Command bodies import what they use, so that help and mistakes in usage
answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hybrid.errors import HybridError
from profiler.common.artifact import package_version
from profiler.common.openmp import passive_waits

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL = click.argument("model", required=False, type=click.Path(path_type=Path))
_BUNDLE = click.option(
    "--bundle", type=click.Path(path_type=Path), help="Folder of the artefacts  [default: MODEL/hybrid]"
)
_CORPUS = click.option(
    "--corpus",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE...",
    help="Text files, .jsonl files or folders. The embedded model has its own.",
)
_SKIP_BAD = click.option("--skip-bad", is_flag=True, help="Leave out and count documents that cannot be used.")
_THREADS = click.option("--threads", type=int, help="CPU threads  [default: all that this process may use]")
_SPARSITY = click.option(
    "--sparsity",
    type=click.Choice(["auto", "dense", "exact", "learned"]),
    default="auto",
    show_default=True,
    help="auto: learned once prepared, until then exact; dense where nothing fires sparsely.",
)
_MLOCK = click.option("--mlock", is_flag=True, help="Read a packed model at once and keep it in memory.")
_CONTEXT = click.option("--context", type=int, help="Tokens of the KV cache  [default: the model's]")
_HARDWARE = click.option(
    "--hardware",
    type=click.Path(path_type=Path),
    help="Hardware profile to plan for, or `default`, a 24 GB GPU  [default: this machine, measured once]",
)
_BUDGET = click.option(
    "--vram-budget", default="unlimited", show_default=True, help="Such as 8GiB; unlimited takes what the GPU has."
)
_RUN_BUDGET = click.option(
    "--vram-budget", help="Bytes to take from the GPU, such as 8GiB or 0  [default: what the placement was made for]"
)
_SOLVER = click.option("--solver", type=click.Choice(["milp", "greedy"]), default="milp", show_default=True)
_TARGET = click.option(
    "--target", default="0.5%", show_default=True, help="Perplexity increase that the predictors may cost."
)


_TOKENS = click.option("--tokens", type=int, default=100_000, show_default=True, help="Calibration tokens.")
_SEED = click.option("--seed", type=int, default=0, show_default=True)


_SAMPLING = {
    "temperature": ("NUMBER", "0 always takes the most likely token."),
    "top-k": ("COUNT", "Keep this many of the most likely tokens; 0 is off."),
    "top-p": ("SHARE", "Keep the most likely tokens that make up this probability; 1 is off."),
    "min-p": ("SHARE", "Drop tokens below this share of the likeliest one's probability; 0 is off."),
    "repetition-penalty": ("NUMBER", "Above 1 makes tokens seen before less likely."),
    "seed": ("INTEGER", "Makes sampled answers repeatable."),
    "max-new-tokens": ("COUNT", "The longest answer."),
}


def _sampling_options(command: Command) -> Command:
    """Sampling options; each is read by `SamplingSettings`, and has the model's own value by default."""
    for name, (metavar, text) in reversed(_SAMPLING.items()):
        command = click.option(f"--{name}", metavar=metavar, help=text)(command)
    return click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_version(), prog_name="hybrid")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run language models whose FFN neurons fire sparsely, hot neurons on the GPU and cold ones on the CPU.

    MODEL is a Hugging Face model folder; without one, the small embedded model is used.
    """


@cli.command()
@_MODEL
@_CORPUS
@_SKIP_BAD
@_TOKENS
@click.option("--window", type=int, help="Tokens per calibration window  [default: 512, or the model's context]")
@_SEED
@_TARGET
@_BUDGET
@_SOLVER
@_CONTEXT
@_HARDWARE
@_BUNDLE
@_THREADS
def prepare(model: Path | None, **options: Any) -> None:
    """Profile, train and place in turn, each skipped when its artefact is present and matches."""
    from hybrid import commands

    _run(commands.prepare, model, options)


@cli.command()
@_MODEL
@_CORPUS
@_SKIP_BAD
@_TOKENS
@click.option("--context", "window", type=int, help="Tokens per window  [default: 512, or the model's context]")
@_SEED
@_BUNDLE
@_THREADS
def profile(model: Path | None, **options: Any) -> None:
    """Record over a corpus how often each neuron fires. Goes on where an interrupted run ended."""
    from hybrid import commands

    _run(commands.profile, model, options)


@cli.command()
@_MODEL
@_TARGET
@_BUNDLE
@_THREADS
@_SEED
def train(model: Path | None, **options: Any) -> None:
    """Train the predictors of which neurons will fire."""
    from hybrid import commands

    _run(commands.train, model, options)


@cli.command()
@_MODEL
@_BUDGET
@_SOLVER
@_CONTEXT
@_HARDWARE
@click.option("--sparsity", type=click.Choice(["exact", "learned"]), default="learned", show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@_BUNDLE
def place(model: Path | None, **options: Any) -> None:
    """Solve which neurons are hot within a VRAM budget, and print the plan."""
    from hybrid import commands

    _run(commands.place, model, options)


@cli.command()
@_MODEL
@click.option(
    "--dtype", type=click.Choice(["bf16", "f16", "int8", "int4"]), required=True, help="What the weights are stored as."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The new folder  [default: packed-DTYPE in the bundle]"
)
@_BUNDLE
def pack(model: Path | None, **options: Any) -> None:
    """Write the weights as they are used: neuron by neuron, in the placement's order, in their run-time type.

    The new folder is itself a MODEL, which starts at once. int8 and int4 are blocks of 32 weights with one scale; int4
    keeps embedding and head in int8.
    """
    from hybrid import commands

    _run(commands.pack, model, options)


@cli.command()
@_MODEL
@_SPARSITY
@_RUN_BUDGET
@_CONTEXT
@_THREADS
@_MLOCK
@_BUNDLE
@_sampling_options
@click.option("--system", help="System prompt.")
def chat(model: Path | None, system: str | None, **options: Any) -> None:
    """Chat in the terminal; with piped input, answer each line and end."""
    from hybrid import commands

    _run(commands.chat, model, system, options)


@cli.command()
@_MODEL
@click.option("-p", "--prompt", help="Text to continue.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a file; - is stdin.")
@_SPARSITY
@_RUN_BUDGET
@_CONTEXT
@_THREADS
@_MLOCK
@_BUNDLE
@_sampling_options
def generate(model: Path | None, prompt: str | None, prompt_file: Path | None, **options: Any) -> None:
    """Continue a text. Only the text goes to stdout, statistics go to stderr."""
    from hybrid import commands

    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either --prompt or --prompt-file")
    _run(commands.generate, model, prompt, prompt_file, options)


@cli.command(name="eval")
@_MODEL
@_CORPUS
@_SKIP_BAD
@click.option("--tokens", type=int, default=16_384, show_default=True, help="Tokens to evaluate.")
@click.option("--context", "window", type=int, help="Tokens per window  [default: 512, or the model's context]")
@click.option("--curve", is_flag=True, help="Also sweep the predictors' thresholds.")
@_THREADS
@_BUNDLE
def evaluate(model: Path | None, **options: Any) -> None:
    """Perplexity, KL and top-1 agreement of each strategy, held against dense."""
    from hybrid import commands

    _run(commands.evaluate, model, options)


@cli.command()
@_MODEL
@click.option("--sparsity", metavar="LIST", help="Such as dense,learned  [default: all that the model can]")
@click.option("--prompt-tokens", type=int, default=128, show_default=True)
@click.option("--tokens", type=int, default=128, show_default=True, help="Tokens of each answer.")
@click.option("--runs", type=int, default=5, show_default=True, help="Runs of each strategy, in turn.")
@click.option("--csv", type=click.Path(path_type=Path), help="Also add a row per strategy to this file.")
@click.option("--peer", type=click.Choice(["llama.cpp"]), help="Run this in turn too (extra: peers).")
@click.option("--peer-model", type=click.Path(path_type=Path), help="The peer's GGUF file.")
@click.option("--json", is_flag=True, help="Print one JSON line in place of tables.")
@click.option("--ablation", is_flag=True, help="Whole layers, random and solved placements at the same --vram-budget.")
@_RUN_BUDGET
@_CONTEXT
@_SEED
@_THREADS
@_BUNDLE
def bench(model: Path | None, ablation: bool, **options: Any) -> None:
    """Measure speed against the ceiling that the memory's read bandwidth sets.

    On a GPU and the CPU together, bandwidths, bytes and memory are those of both.
    """
    from hybrid.bench import ablation as ablations
    from hybrid.bench import bench

    _run(ablations.ablation if ablation else bench.bench, model, options)


@cli.command()
@_MODEL
@_BUNDLE
@click.option("--check", is_flag=True, help="Read all of a packed model; exit code 2 where an artefact is damaged.")
def inspect(model: Path | None, bundle: Path | None, check: bool) -> None:
    """Show the model, its artefacts, budgets and where each came from."""
    from hybrid import reports

    reports.inspect(model, bundle, check)


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The profile to write, JSON.")
def hardware(output: Path) -> None:
    """Measure this machine for `place --hardware`, in under a minute: memory, GPU kernels, PCIe, hand-off."""
    from hybrid.bench import hardware as hardware_report

    _run(hardware_report.hardware, output)


@cli.command()
@_MODEL
def doctor(model: Path | None) -> None:
    """Show CPU features, threads, GPU and versions, and what would be used and why."""
    from hybrid import reports

    reports.doctor(model)


def _run(command: Callable[..., None], *arguments: Any) -> None:
    """Do the command's work, and say so when it has to wait for the compiler."""
    from hybrid.console import compile_notice

    with compile_notice():
        command(*arguments)


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `hybrid` command; always ends by `SystemExit`."""
    arguments = repeat_corpus(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments[:1]
    try:
        with passive_waits(), cli.make_context("hybrid", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        code = 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "hybrid"
        message = " ".join(error.format_message().split())  # click lists choices on lines of their own
        click.echo(f"hybrid: {message} (see {path} --help)", err=True)
        code = error.exit_code
    except click.exceptions.Exit as leave:
        code = leave.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo(": ".join(["interrupted", *map(str, stop.args)]), err=True)
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `hybrid generate ... | head`; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except HybridError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"hybrid: {error}", err=True)
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort: one line instead of a traceback, exit code 1
        if debug:
            traceback.print_exc()
        click.echo(f"hybrid: {type(error).__name__}: {error}; `hybrid --debug ...` shows where", err=True)
        code = 1
    sys.exit(code)
