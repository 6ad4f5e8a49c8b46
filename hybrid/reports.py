"""What is there of a model: `hybrid inspect`, and the tables of a profile and of predictors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import click

from hybrid.console import counted, details, percent, progress, size, table
from hybrid.errors import ArtifactError
from hybrid.formats.bundle import EMBEDDED_MODEL, Bundle
from hybrid.formats.packed import PACKED_FILE, open_packed
from hybrid.formats.packed_predictors import PREDICTORS_FILE, open_packed_predictors
from hybrid.model.loader import ModelFolder
from placement.plan import UNLIMITED
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.report import PredictorReport
from predictor.target import PredictorTarget
from profiler.common.artifact import ArtifactFile
from profiler.common.spec import ModelSpec
from profiler.profile import IMPORTED, NeuronProfile


def inspect(model: Path | None, bundle: Path | None, check: bool = False) -> None:
    """Print the model's shape and each artefact with where it came from, whatever state it is in.

    With `check` the files of a packed model, which are mapped and not read to be used, are read whole and held against
    their digests; raises `ArtifactError` after all where an artefact that is there cannot be used.
    """
    folder = ModelFolder.open(model or EMBEDDED_MODEL)
    spec = folder.spec
    files = Bundle.of(folder.path, spec, bundle)
    click.echo(details(f"model {model or '(embedded)'}", _model_rows(spec)))
    for notice in folder.notices:
        click.echo(f"note: {notice}")
    shown: list[tuple[str, Path, Callable[[], str]]] = [
        ("profile", files.profile, lambda: _show_profile(files, spec)),
        ("predictors", files.predictors, lambda: _show_predictors(files, spec)),
        ("placement", files.placement, lambda: _show_placement(files, spec)),
    ]
    if files.proxy.is_file():
        shown.append(("proxies", files.proxy, lambda: _show_proxies(files, spec)))
    if files.copies.is_file() and spec.fires_sparsely:
        shown.append(("certificates", files.copies, lambda: _show_copies(files, spec)))
    if folder.is_packed:
        packed = partial(_show_packed, partial(open_packed, folder.path), check)
        shown.append(("packed weights", folder.path / PACKED_FILE, packed))
        packed = partial(_show_packed, partial(open_packed_predictors, folder.path, spec), check)
        shown.append(("packed predictors", folder.path / PREDICTORS_FILE, packed))
    damaged = []
    for title, path, show in shown:
        try:
            text = show()
        except ArtifactError as error:
            text = str(error)
            damaged += [text] if path.exists() else []
        except (KeyError, TypeError) as error:  # of `made_from`, which another program may have written
            text = f"{path} does not say how it was made ({error}); `{files.repair}` makes it anew"
        click.echo(f"\n{title}\n{text}")
    for line in files.stale(spec):
        click.echo(f"\nstale: {line}")
    if check and damaged:
        raise ArtifactError(damaged[0])


def _model_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    attention = f"{spec.n_heads} heads, {spec.n_kv_heads} for keys and values, {spec.head_dim} wide"
    ffn = f"{spec.d_ff:,} neurons per layer, {spec.activation}, {'gated' if spec.gated else 'not gated'}"
    return [
        ("family", spec.family),
        ("fingerprint", spec.fingerprint),
        ("layers", str(spec.n_layers)),
        ("width", str(spec.d_model)),
        ("attention", attention),
        ("FFN", ffn),
        ("fires sparsely", "yes" if spec.fires_sparsely else "no: dense, or by proxies"),
        ("vocabulary", f"{spec.vocab_size:,}"),
        ("context", f"{spec.max_context:,} tokens"),
        ("weights", f"{spec.dtype}, {size(spec.model_bytes)}"),
        ("of which FFN", size(spec.n_layers * spec.layer_ffn_bytes)),
        (
            "KV cache at full context",
            f"{size(spec.n_layers * spec.kv_bytes_per_layer(spec.max_context))} in {spec.kv_dtype}",
        ),
    ]


def _show_profile(files: Bundle, spec: ModelSpec) -> str:
    found = files.load_profile(spec)
    made = found.header.made_from
    if found.is_imported:
        return f"{_file_line(files.profile)}, key {found.header.key}\n{_came_with(made)}\n{profile_report(found)}"
    names = ", ".join(made["corpus_files"][:3])
    origin = f"{names} (hash {made['corpus']}), windows of {made['window']}, seed {made['seed']}"
    origin += f"; {made['own_text']} tokens of the model's own text" if made.get("own_text") else ""
    return f"{_file_line(files.profile)}, key {found.header.key}\nfrom {origin}\n{profile_report(found)}"


def _show_predictors(files: Bundle, spec: ModelSpec) -> str:
    bank = files.load_predictors(spec)
    made: dict[str, Any] = bank.header.made_from if bank.header else {}
    key = bank.header.key if bank.header else ""
    if IMPORTED in made:
        sizes = f"rank {min(p.rank for p in bank.predictors)} to {max(p.rank for p in bank.predictors)}"
        return f"{_file_line(files.predictors)}, key {key}\n{_came_with(made)}; {sizes}, {predictor_report(bank)}"
    target = PredictorTarget(**made["target"])
    origin = (
        f"profile {made['profile']}; target: perplexity {target.max_perplexity_increase:+.2%} at most, "
        f"{target.max_active_ratio:g} times the firing neurons, {target.max_bytes_share:.0%} of the model's bytes"
    )
    return f"{_file_line(files.predictors)}, key {key}\nfrom {origin}\n{predictor_report(bank)}"


def _came_with(made: dict[str, Any]) -> str:
    return f"came with {made[IMPORTED]}"


def _show_placement(files: Bundle, spec: ModelSpec) -> str:
    placement = files.load_placement(spec)
    made = placement.made_from
    if "vram_budget" not in made:
        return f"{_file_line(files.placement)}, not made by `hybrid place`"
    budget = "unlimited" if made["vram_budget"] == UNLIMITED else size(made["vram_budget"])
    rows = [
        ("VRAM budget", budget),
        ("context", f"{made['context']:,} tokens"),
        ("planned for", made["hardware"]),
        ("solver", f"{made['solver']}, {made['status']}, gap {made['gap']:.4%}"),
        ("predicted there", f"{made['predicted_tokens_per_second']:,.1f} tokens/s ({made['strategy']})"),
        ("hot neurons", percent(float(placement.hot.sum()) / (spec.n_layers * spec.d_ff))),
        ("from profile", made["profile"]),
        ("from predictors", str(made["predictors"])),
    ]
    return details(_file_line(files.placement), rows)


def _show_packed(opened: Callable[[], AbstractContextManager[ArtifactFile]], check: bool) -> str:
    with opened() as file:
        line = f"{_file_line(file.path)}, {counted(len(file.places), 'tensor')}, key {file.header.key}"
        if file.digests is None:
            return f"{line}\nno digests: packed by an earlier version; pack the model again to have them"
        if not check:
            return f"{line}\ndigests not held against the file: `hybrid inspect --check` does it"
        with progress("check", sum(place.end - place.start for place in file.places.values()), "byte") as advance:
            file.check(advance)
        return f"{line}\nwhole, by its digests"


def _file_line(path: Path) -> str:
    return f"{path}, {size(path.stat().st_size)}"


def profile_report(found: NeuronProfile) -> str:
    """Share firing and coverage by the hottest neurons, per layer and for the whole model."""
    shares = (0.1, 0.2, 0.4)
    layers = zip(found.share_firing(), *(found.layer_coverage(share) for share in shares), strict=True)
    rows = [[str(number), *map(percent, values)] for number, values in enumerate(layers)]
    rows.append(["all", percent(float(found.share_firing().mean())), *(percent(found.coverage(s)) for s in shares)])
    header = ["layer", "firing", *(f"hottest {share:.0%} cover" for share in shares)]
    return f"{table(header, rows)}\n{found.tokens:,} tokens, {found.inputs.shape[1]:,} FFN inputs kept per layer"


def _show_proxies(files: Bundle, spec: ModelSpec) -> str:
    bank = files.load_proxies(spec)
    made = bank.header.made_from if bank.header else {}
    target = PredictorTarget(**made["target"])
    origin = f"profile {made['profile']}; target: perplexity {target.max_perplexity_increase:+.2%} at most"
    copies = f"copies of {' and '.join(bank.copies.form.parts)} in {bank.copies.form.blocks}"
    return f"{_file_line(files.proxy)}; {copies}: {_file_line(files.copies)}\nfrom {origin}\n{predictor_report(bank)}"


def _show_copies(files: Bundle, spec: ModelSpec) -> str:
    header = files.copies_header(spec)
    uncertain = header.made_from.get("uncertain")
    found = "" if uncertain is None else f"; silent neurons left in doubt: {percent(uncertain)}"
    return f"{_file_line(files.copies)}, key {header.key}{found}"


def predictor_report(bank: PredictorBank | ProxyBank) -> str:
    """Size and quality of predictors or proxies, per layer and overall, and where they miss their target."""
    report = bank.report
    if report is None:
        return "no report"
    lines = [_perplexity_line(report), *(f"short of the target: {line}" for line in report.shortfalls)]
    if isinstance(bank, ProxyBank):
        header = ["layer", "size", "computed", "missed mass"]
        rows = [
            [q.layer, size(q.bytes), percent(q.predicted_share), f"{q.missed_mass:.2%}"]
            for q in (*report.layers, report.overall)
        ]
        return "\n".join([table(header, rows), *lines])
    header = ["layer", "rank", "size", "recall", "precision", "predicted", "fired", "ratio", "missed mass"]
    rows = [
        [
            q.layer,
            str(q.rank),
            size(q.bytes),
            percent(q.recall),
            percent(q.precision),
            percent(q.predicted_share),
            percent(q.fired_share),
            f"{q.active_ratio:.2f}",
            f"{q.missed_mass:.2%}",
        ]
        for q in (*report.layers, report.overall)
    ]
    return "\n".join([table(header, rows), *lines])


def _perplexity_line(report: PredictorReport) -> str:
    increase = report.perplexity_increase
    measured = "not measured" if increase is None else f"{increase:+.2%}"
    return f"perplexity against dense: {measured}; {report.tokens:,} validation tokens for the table"
