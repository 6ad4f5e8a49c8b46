"""What each command does: build from options, call the step, print. One function per command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from hybrid.bench.hardware import hardware_progress
from hybrid.chat.continuation import show_continuation
from hybrid.chat.repl import run_repl
from hybrid.chat.screen import Screen
from hybrid.chat.terminal import open_terminal
from hybrid.console import percent, progress, size, table
from hybrid.errors import BudgetError, InputError
from hybrid.evaluation import eval_reports
from hybrid.formats.bundle import EMBEDDED_CORPUS, EMBEDDED_MODEL, Bundle
from hybrid.formats.messages import MAX_CHARACTERS
from hybrid.formats.packed import PackedModel
from hybrid.generation import SamplingSettings
from hybrid.model.loader import ModelFolder
from hybrid.model.powerinfer_import import import_artefacts, is_powerinfer
from hybrid.offline.certify import certify as certify_neurons
from hybrid.offline.certify import is_worth_more, uncertainty
from hybrid.offline.export import export as export_powerinfer
from hybrid.offline.own_text import Writer
from hybrid.offline.pack import Packer
from hybrid.offline.project import ProfileRequest, Project
from hybrid.offline.proxies import maker_of
from hybrid.options import chosen_sampling
from hybrid.reports import predictor_report, profile_report
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.continuation import continued
from hybrid.runtime.engine import Engine
from placement.placement import PlacementResult, PlacementSettings
from placement.plan import UNLIMITED, parse_size
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.target import PredictorTarget
from profiler.common.artifact import ArtifactHeader
from profiler.common.hardware import HardwareProfile
from profiler.machine.measure import measure_hardware
from profiler.profile import NeuronProfile

Options = Mapping[str, Any]
_Made = tuple[ArtifactHeader, ArtifactHeader | None]  # a profile and predictors
_CURRENT = "present and current"
# Tokens of the corpus for one that the model continues itself, which takes two to five times as long (embedded model).
# Where own text was nearly half, predictors named 2 to 5% fewer neurons for answers (LOG.md).
_CORPUS_PER_OWN = 6


def prepare(model: Path | None, options: Options) -> None:
    """Profile, train, place; each skipped when what it would make is there."""
    project = _project(model, options)
    if not project.spec.fires_sparsely and not project.spec.proxied:
        click.echo("neurons never are 0, and copies of int4 rows would be as long as the rows: it runs dense")
        return
    if is_powerinfer(project.folder) and not options["corpus"]:
        _prepare_imported(project, options)
        return
    request, target = _profile_request(project, options), _target(options)
    by, seed = maker_of(project, progress), options["seed"]
    settings = _placement_settings(project, options, by.strategy)
    # A budget beyond the hardware is refused before the work, not after it; without a GPU there is nothing to refuse.
    hardware = _hardware(project, options) if torch.cuda.is_available() else _known_hardware(project, options)
    if hardware is not None:
        settings.planned_bytes(hardware)
    profile_header = project.current_profile(request)
    click.echo(f"profile: {_CURRENT if profile_header else 'recording'}", err=True)
    profile_header = profile_header or project.profile(request, _writer(project)).header
    predictors = by.current_predictors(profile_header, target, seed)
    click.echo(f"train: {_CURRENT if predictors else 'training'}", err=True)
    predictors = predictors or by.train(project.load_profile(), target, seed).header
    _place_anew(project, settings, hardware or _hardware(project, options), (profile_header, predictors))


def _prepare_imported(project: Project, options: Options) -> None:
    """Place by what came with a PowerInfer file, or was made since; a corpus is wanted to train anew."""
    found = project.load_profile(samples=False)
    bank = project.load_predictors() if project.bundle.predictors.is_file() else None
    settings = _placement_settings(project, options, "learned" if bank else "exact")
    hardware = _hardware(project, options)
    settings.planned_bytes(hardware)
    click.echo("profile, train: what came with the file; with --corpus FILE... made anew", err=True)
    _place_anew(project, settings, hardware, (found.header, bank.header if bank else None))


def _place_anew(project: Project, settings: PlacementSettings, hardware: HardwareProfile, made: _Made) -> None:
    """Solve and write the placement, unless the present one is what would be made of the profile and predictors."""
    (profile, predictors), sparse = made, project.spec.fires_sparsely
    certified = replace(settings, strategy="certified")
    ways = [(settings, predictors)] + [(certified, None)] * (sparse and project.bundle.has_copies(project.spec))
    if any(project.placement_is_current(project.place_origin(profile, by, hardware), way) for way, by in ways):
        click.echo(f"place: {_CURRENT}", err=True)
        return
    found = project.load_profile(samples=False)
    bank = maker_of(project, progress).load_predictors() if predictors else None
    result = project.place(found, bank, hardware, settings)
    if project.spec.certifiable:
        doubt = uncertainty(project)
        other = project.place(found, None, hardware, certified.with_certificates(doubt))
        if is_worth_more(other, result, bank):
            click.echo("certify: it is as fast, and loses nothing", err=True)
            certify_neurons(project, progress, doubt)
            result = other
    project.write_placement(result.placement)
    click.echo(f"place: {_placement_summary(result, counts_of(found, bank), hardware.has_gpu)}", err=True)


def profile(model: Path | None, options: Options) -> None:
    """Record and print a profile."""
    project = _project(model, options)
    found = project.profile(_profile_request(project, options), _writer(project))
    click.echo(profile_report(found))
    click.echo(f"wrote {project.bundle.profile}", err=True)


def train(model: Path | None, options: Options) -> None:
    """Train predictors on the stored profile, or make proxies by it, and print their report."""
    project = _project(model, options)
    bank = maker_of(project, progress).train(project.load_profile(), _target(options), options["seed"])
    click.echo(predictor_report(bank))
    files = project.bundle
    click.echo(f"wrote {files.predictors if isinstance(bank, PredictorBank) else files.proxy}", err=True)


def certify(model: Path | None, options: Options) -> None:
    """Make and write copies of gates, and say what they are."""
    project = _project(model, options)
    made = certify_neurons(project, progress).made_from
    if "uncertain" in made:
        click.echo(f"silent neurons that it leaves in doubt: {percent(made['uncertain'])}")
    nbytes = project.bundle.copies.stat().st_size
    _say(f"wrote {project.bundle.copies}, {size(nbytes)}; used by --sparsity certified")


def place(model: Path | None, options: Options) -> None:
    """Solve, print and write a placement."""
    project = _project(model, options)
    by = maker_of(project, progress)
    settings = _placement_settings(project, options, options["sparsity"] or by.strategy)
    project.require_strategy(settings.strategy)
    found = project.load_profile(samples=False)
    bank = by.load_predictors() if settings.strategy == by.strategy else None
    if settings.strategy == "certified":
        project.bundle.copies_header(project.spec)
    hardware = _hardware(project, options)
    if bank and bank.header and bank.header.made_from.get("profile", found.header.key) != found.header.key:
        click.echo("note: the predictors were trained on another profile than the present; `hybrid train`", err=True)
    result = project.place(found, bank, hardware, settings)
    click.echo(placement_report(result, counts_of(found, bank), settings.planned_bytes(hardware), hardware))
    if options["dry_run"]:
        click.echo("dry run: nothing written", err=True)
        return
    project.write_placement(result.placement)
    click.echo(f"wrote {project.bundle.placement}", err=True)


def counts_of(found: NeuronProfile, bank: PredictorBank | ProxyBank | None) -> NeuronProfile | ProxyBank:
    """What says how often neurons fire: the profile, or proxies, as those of such a model fire where they pass."""
    return bank if isinstance(bank, ProxyBank) else found


def placement_report(
    result: PlacementResult, found: NeuronProfile | ProxyBank, budget: int, hardware: HardwareProfile
) -> str:
    """The plan in bytes, hot neurons per layer, what is expected of it, and how the solver ended."""
    total = sum(count for _, count in result.rows)
    plan = table(
        ["on the GPU", "bytes", ""],
        [[name, f"{count:,}", size(count)] for name, count in [*result.rows, ("total", total), ("budget", budget)]],
    )
    solution = result.solution
    return (
        f"{plan}\n\n{result.placement.table()}\n\nhardware profile: {hardware.name} ({hardware.source})\n"
        f"{_placement_summary(result, found, hardware.has_gpu)}\n"
        f"solver: {solution.solver}, {solution.status}, gap {solution.gap:.4%}, {solution.solver_seconds:.2f} s, "
        f"{solution.columns:,} options"
    )


def pack(model: Path | None, options: Options) -> None:
    """Write and verify a packed copy of a model."""
    path, dtype = model or EMBEDDED_MODEL, options["dtype"]
    if PackedModel.is_packed(path):
        raise InputError(f"{path} is packed already; give the model that it was made from")
    folder = ModelFolder.open(path)
    bundle = Bundle.of(folder.path, folder.spec, options["bundle"])
    for notice in import_artefacts(folder, bundle):
        _say(f"note: {notice}")
    out = options["output"] or bundle.path / f"packed-{dtype}"
    packer = Packer(folder, bundle, dtype, progress)
    if dtype == "int4" and packer.profile is None and folder.spec.fires_sparsely:
        click.echo("note: no profile, so int4 is rounded plainly; `hybrid profile` first makes it better", err=True)
    result = packer.pack(out.absolute())
    if result.errors and path.is_file():
        lost = ", ".join(f"{name} {error:.2%}" for name, error in result.errors.items())
        click.echo(
            f"note: rounded once more, at a root mean square error, as a share of the weights', of: {lost}", err=True
        )
    state = "wrote" if result.written else f"{_CURRENT}:"
    click.echo(f"{state} {out}, {size(result.nbytes)} in {dtype}; it is a model: hybrid chat {out}", err=True)


def export(model: Path | None, output: Path, kind: Any, options: Options) -> None:
    """Write PowerInfer's files, and print what its predictors, which have no biases, cost."""
    project = _project(model, options)
    project.require_sparse()
    result = export_powerinfer(project, output.absolute(), kind, progress)
    rows = [
        [name, str(q.rank), percent(q.recall), percent(q.precision), f"{q.active_ratio:.2f}", f"{q.missed_mass:.2%}"]
        for name, q in (("ours", result.before), ("PowerInfer's form", result.after))
    ]
    click.echo(table(["predictors", "rank", "recall", "precision", "ratio", "missed mass"], rows))
    if result.perplexity_increase is not None:
        click.echo(f"perplexity of the latter against dense: {result.perplexity_increase:+.2%}")
    if not result.hot:
        _say(
            "note: the placement has no hot neurons; another machine's: hybrid place --hardware FILE --vram-budget 8GiB"
        )
    _say(f"wrote {result.model}, {size(result.nbytes)} in {kind}; run it with PowerInfer's main -m {result.model}")


def chat(model: Path | None, system: str | None, options: Options) -> None:
    """Open the REPL, or answer piped lines."""
    terminal = open_terminal()
    config = engine_config(options)
    folder = open_model(model, options)
    if not folder.codec.has_chat_template:
        raise InputError("this model has no chat template; use `hybrid generate` with plain text instead")
    with closing(Engine.load(folder, config)) as engine:
        settings = chosen_sampling(engine.settings, options)
        name = str(model or "embedded model")
        run_repl(engine, terminal, settings, system, header=_chat_header(engine, name), model_name=name)


def generate(model: Path | None, prompt: str | None, prompt_file: Path | None, options: Options) -> None:
    """Stream the continuation to stdout; statistics to stderr."""
    text = prompt if prompt is not None else _read_prompt(prompt_file or Path("-"))
    config = engine_config(options)
    with closing(Engine.load(open_model(model, options), config)) as engine:
        settings = chosen_sampling(engine.settings, options)
        out, err = Screen(sys.stdout, os.environ), Screen(sys.stderr, os.environ)
        for notice in engine.notices:
            err.line(f"note: {notice}")
        show_continuation(partial(engine.generate, text, settings), settings, engine.context, out, err)


def evaluate(model: Path | None, options: Options) -> None:
    """Print the quality of each strategy, with `curve` that of the predictors over a sweep of thresholds, and with
    `answers` that of long answers."""
    project = _project(model, options)
    corpus = _corpus(project, options, "heldout.jsonl")
    request = ProfileRequest(corpus, options["tokens"], _window(project, options), skip_bad=options["skip_bad"])
    windows = project.windows(request)
    given = {name: options[name] for name in ("kv", "prefill", "curve", "answers", "answer_tokens")}
    for table_of in eval_reports(project, windows, **given):
        click.echo(table_of)


def _project(model: Path | None, options: Options) -> Project:
    threads = EngineConfig(threads=options.get("threads")).threads
    project = Project(model or EMBEDDED_MODEL, options["bundle"], threads, progress, _say)
    for notice in project.folder.notices:
        _say(f"note: {notice}")
    return project


def _say(line: str) -> None:
    click.echo(line, err=True)


def _window(project: Project, options: Options) -> int:
    return options["window"] if options["window"] is not None else min(512, project.spec.max_context)


def _corpus(project: Project, options: Options, embedded: str) -> tuple[Path, ...]:
    """The files that were named; else, for the embedded model, a copy or a packed one, its own corpus."""
    if options["corpus"]:
        return tuple(options["corpus"])
    is_embedded = project.spec.fingerprint == ModelFolder.open(EMBEDDED_MODEL).spec.fingerprint
    return (EMBEDDED_CORPUS / embedded,) if is_embedded else ()


def _profile_request(project: Project, options: Options) -> ProfileRequest:
    corpus = _corpus(project, options, "calibration.jsonl")
    own = options["tokens"] // _CORPUS_PER_OWN if options["own_text"] is None else options["own_text"]
    window = _window(project, options)
    return ProfileRequest(corpus, options["tokens"], window, options["seed"], options["skip_bad"], own)


def _writer(project: Project) -> Writer:
    """What lets a model continue texts as it would, by all its probabilities; sparsity changes nothing."""

    def write(prompts: np.ndarray, length: int, seed: int, advance: Callable[[int], None]) -> np.ndarray:
        settings = SamplingSettings(1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=seed)
        strategy: Any = "exact" if project.spec.fires_sparsely else "dense"
        return continued(project.model, project.runtime, strategy, prompts, length, settings, advance)

    return write


def _target(options: Options) -> PredictorTarget:
    return PredictorTarget.parse(options["target"])


def _hardware(project: Project, options: Options) -> HardwareProfile:
    """The profile that was asked for; else this machine's, measured once and kept beside the other artefacts."""
    known = _known_hardware(project, options)
    if known is not None:
        return known
    measured = measure_hardware(hardware_progress)
    if not options.get("dry_run"):
        measured.save(project.bundle.hardware)
    return measured


def _known_hardware(project: Project, options: Options) -> HardwareProfile | None:
    """What was asked for, `default` being the built-in profile, or was measured already; nothing is measured here."""
    named, has_gpu = options["hardware"], torch.cuda.is_available()
    if named:
        return HardwareProfile.load() if str(named) == "default" else HardwareProfile.load(named)
    if not has_gpu and parse_size(options["vram_budget"]) not in (0, UNLIMITED):
        raise BudgetError(
            "there is no GPU here that torch can use; leave --vram-budget out, or plan for another machine: "
            "--hardware FILE, or --hardware default, a 24 GB GPU"
        )
    stored = HardwareProfile.load(project.bundle.hardware) if project.bundle.hardware.is_file() else None
    return stored if stored and stored.has_gpu == has_gpu else None


def _placement_settings(project: Project, options: Options, strategy: Any) -> PlacementSettings:
    budget = parse_size(options["vram_budget"])
    context = options["context"] if options["context"] is not None else project.spec.max_context
    settings = PlacementSettings(budget, context, strategy, options["solver"])
    project.check_context(context)
    return settings


def _placement_summary(result: PlacementResult, found: NeuronProfile | ProxyBank, has_gpu: bool) -> str:
    made, placement = result.placement.made_from, result.placement
    if placement.choice.uses_gpu:
        served = f"share of firings served hot: {percent(placement.hot_firing_share(found.frequency()))}; "
    else:
        served = "nothing fits or pays on the GPU; " if has_gpu else "no GPU: all neurons are computed by the CPU; "
    predicted = f"predicted {made['predicted_tokens_per_second']:,.1f} tokens/s ({made['strategy']})"
    return f"{served}{predicted} on: {made['hardware']}"


def open_model(model: Path | None, options: Options) -> ModelFolder:
    """The model's folder, its weights kept in memory where that is wanted. Raises as `ModelFolder.open` does."""
    folder = ModelFolder.open(model or EMBEDDED_MODEL)
    if options["mlock"]:
        if not isinstance(folder.weights, PackedModel):
            raise InputError(f"--mlock is for packed models, {folder.path} is not one; make one with `hybrid pack`")
        folder.weights.lock()
    return folder


def engine_config(options: Options) -> EngineConfig:
    """How the command line says that a model is run."""
    names = ("sparsity", "context", "threads", "bundle", "vram_budget", "kv", "prefill")
    return EngineConfig(**{name: options[name] for name in names})


def _read_prompt(path: Path) -> str:
    """The text of a file, or of standard input for `-`, without the newline that ends its last line."""
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(MAX_CHARACTERS + 1)
        if len(data) > MAX_CHARACTERS:
            raise InputError(f"the prompt in {path} has more than {MAX_CHARACTERS:,} bytes; give a shorter text")
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise InputError(f"cannot read the prompt from {path}: {error.strerror}; give a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt in {path} is not UTF-8 text; give a text file") from error


def _chat_header(engine: Engine, name: str) -> str:
    spec, plan = engine.model.spec, engine.plan
    lines = [f"{name}: {spec.n_layers} layers, {spec.family}, {spec.dtype}; {plan.summary()}. /help for commands."]
    return "\n".join([*lines, *(f"note: {notice}" for notice in engine.notices)])
