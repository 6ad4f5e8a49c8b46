"""Make a model that fires sparsely out of a dense one: SiLU or GELU gates become ReLU, and the weights follow.

    python scripts/relufy.py MODEL --corpus TEXT --firing 15% -o OUT

MODEL is the folder of a Llama-like model with gated SiLU or GELU. What is learnt from the corpus are the dense model's
own predictions: no labels, and quality is held against the dense model. OUT becomes a model folder whose FFN neurons
fire for the wanted share, with `relufy.json`, the report on text that was held back, `train_log.json` and, unless all
weights are learnt, `difference.npz`: what MODEL needs to become OUT, a few MB. One GPU, minutes; `--device cpu --steps
3` is a trial.

A run that was stopped goes on from OUT.checkpoint when it is called again.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from relufy_net import MATRICES, Base, Difference, Network, load_base, tensor_name
from relufy_train import Report, Settings, Training, load_checkpoint, measure, save_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from hybrid.console import progress
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.config import read_json
from hybrid.formats.difference import Difference as LowRank
from hybrid.formats.difference import write_difference
from hybrid.formats.new_folder import new_folder
from hybrid.formats.text import TextCodec
from profiler.common.errors import CorpusError, HybridError, InputError
from profiler.common.spec import ModelSpec
from profiler.corpus import Skipped, corpus_files, read_documents

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
          "chat_template.jinja", "tokenizer.model")  # fmt: skip
_TOKEN_SUFFIXES = (".bin", ".bin.xz")


def tell(line: str) -> None:
    """Say how far it is, on stderr."""
    click.echo(line, err=True)


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Token ids of a file of uint16 ids. Raises `CorpusError` for one that is not."""
    try:
        content = path.read_bytes()
        ids = np.frombuffer(lzma.decompress(content) if path.suffix == ".xz" else content, np.uint16)
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise CorpusError(f"{path} is not a file of uint16 token ids ({error}); write it again") from error
    if len(ids) and ids.max() >= vocab_size:
        raise CorpusError(f"{path} holds token id {ids.max()}, the vocabulary has {vocab_size}; tokenize it again")
    return ids


def read_corpus(paths: Sequence[Path], codec: TextCodec, spec: ModelSpec) -> np.ndarray:
    """Token ids int32: of files of ids, as they are; and of text, one document after another, each with its end token.
    Raises `CorpusError` for what cannot be read."""
    text = [path for path in paths if not path.name.endswith(_TOKEN_SUFFIXES)]
    found = [read_tokens(path, spec.vocab_size).astype(np.int32) for path in paths if path not in text]
    if text:
        with progress("reading", sum(path.stat().st_size for path in corpus_files(text)), "byte") as advance:
            for document in read_documents(text, Skipped(), advance):
                if document.messages:
                    ids = codec.encode_chat(document.messages, add_generation_prompt=False) + codec.eos_tokens()
                else:
                    ids = codec.encode_document(document.text)
                found.append(np.array(ids, np.int32))
    if not found:
        raise CorpusError(f"there is no text in {', '.join(map(str, paths))}; give files with some")
    return np.concatenate(found)


def windows_of(ids: np.ndarray, context: int) -> Tensor:
    """Windows [n, context] int32 of token ids; what is over is left out."""
    count = len(ids) // context
    return torch.from_numpy(ids[: count * context].reshape(count, context))


@dataclass(frozen=True)
class Text:
    """Windows [n, context] int32 to train on and to measure on, apart from each other."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def read(
        cls, model: Path, spec: ModelSpec, corpus: Sequence[Path], held_out: Sequence[Path], count: int, context: int
    ) -> Text:
        """held_out: files to measure on; without any, the corpus's last windows. count: at most so many.

        Raises `CorpusError` where there is no window for either.
        """
        codec = TextCodec(model, spec.vocab_size)
        windows = windows_of(read_corpus(corpus, codec, spec), context)
        if held_out:
            found = cls(windows, windows_of(read_corpus(held_out, codec, spec), context)[:count])
        else:
            kept = min(count, len(windows) // 10)
            found = cls(windows[: len(windows) - kept], windows[len(windows) - kept :])
        if not len(found.train) or not len(found.held_out):
            raise CorpusError(
                f"the corpus gives {len(found.train)} windows of {context} tokens to train on and "
                f"{len(found.held_out)} to measure on, expected 1 or more of each; add text or lower --context"
            )
        return found

    def digest(self) -> str:
        """16 hex digits of what is trained on."""
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:16]


def write_folder(model: Path, folder: Path, difference: Difference, bits: int, log: Any) -> None:
    """Write the sparse model: `model` with the difference, after its rounding to `bits` where it is of low rank."""
    layers = range(difference.layer_count)
    path, rounded = folder / "difference.npz", None
    if difference.is_low_rank:
        products = {tensor_name(kind, n): difference.factors(kind, n) for kind in MATRICES for n in layers}
        write_difference(path, products, difference.vectors(), bits)
        rounded = LowRank.load(path)
    whole = {f"{tensor_name(kind, n)}.weight": (kind, n) for kind in MATRICES for n in layers}
    vectors = difference.vectors()
    checkpoint, weights = Checkpoint(model), {}
    for name, info in checkpoint.infos.items():
        weight, stem = checkpoint.tensor(name, info.shape), name.removesuffix(".weight")
        if rounded is not None:
            weight = rounded.applied(stem, weight)
        elif name in whole:
            kind, n = whole[name]
            weight = difference.whole(kind, n).cpu().to(weight.dtype)
        elif stem in vectors:
            weight = vectors[stem].to(weight.dtype)
        weights[name] = weight.contiguous()
    config = read_json(model / "config.json")
    config["hidden_activation" if "hidden_act" not in config else "hidden_act"] = "relu"
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    for name in COPIED:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    for name, content in (("config.json", config), ("train_log.json", log)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def relufy(model: Path, out: Path, text: Text, base: Base, settings: Settings, options: Options) -> Report:
    """Train, write `out`, and measure what was written. Raises `HybridError` or a subclass."""
    compiled = base.embedding.is_cuda
    ranks = {kind: options.rank for kind in MATRICES} | {"gate": options.gate_rank or options.rank}
    difference = Difference(base, ranks, settings.seed)
    if options.start:
        difference.start_from(options.start)
    origin = {"model": base.fingerprint, "corpus": text.digest(), "rank": str(ranks)}
    origin |= {name: value for name, value in asdict(settings).items() if name not in ("minutes", "steps")}
    training = Training(base, difference, text.train, settings, compiled)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if checkpoint.exists():
        load_checkpoint(checkpoint, training, difference, origin)
        tell(f"going on from {checkpoint}: step {training.state.step}, {training.state.seconds:.0f} s")

    def save() -> None:
        save_checkpoint(checkpoint, training, difference, origin)

    learnt = sum(parameter.numel() for parameter in difference.parameters())
    tell(f"{text.train.numel():,} tokens to train on, {text.held_out.numel():,} held out; {learnt:,} numbers to learn")
    training.run(tell, save, options.save_minutes)
    save()  # should writing fail, nothing is lost
    seconds, tokens = training.state.seconds, training.tokens
    tell(f"{tokens:,} tokens in {seconds:.0f} s; writing and measuring {out}")
    with new_folder(out, 0, replaces=False) as folder:
        log = {"settings": asdict(settings), "ranks": ranks, "tokens": tokens, "seconds": seconds}
        write_folder(model, folder, difference, options.bits, log | {"rows": training.state.rows})
        report = measure_folder(folder, base, text.held_out)
        (folder / "relufy.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink()
    return report


def measure_folder(folder: Path, base: Base, held_out: Tensor) -> Report:
    """A sparse model's folder against the dense one. Raises `ModelError` for one of another shape."""
    sparse = load_base(folder, str(base.embedding.device), base.embedding.dtype, sparse=True)
    return measure(Network(base, held_out.shape[1], False), base, sparse, held_out)


@dataclass(frozen=True)
class Options:
    """What is not about training: ranks (None: all weights), bits of the difference, what to start from."""

    rank: int | None = 32
    gate_rank: int | None = None
    bits: int = 6
    start: Path | None = None
    save_minutes: float = 2.0


def _share(context: click.Context, parameter: click.Parameter, value: str) -> float:
    try:
        return float(value.removesuffix("%")) / 100 if value.endswith("%") else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r}, expected a share such as 15%") from None


def _rank(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    if value == "full":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value!r}, expected a number above 0, or full")
    return int(value)


_PATH = click.Path(path_type=Path)


@click.command(help="Make a model with ReLU gates that fires sparsely out of a dense one with SiLU or GELU gates.")
@click.argument("model", type=_PATH)
@click.option("--corpus", type=_PATH, multiple=True, required=True, help="Text, .jsonl, folders; or .bin token ids.")
@click.option("--held-out", type=_PATH, multiple=True, help="Text to measure on.  [default: the corpus's last windows]")
@click.option("--held-out-windows", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("-o", "--out", type=_PATH, help="New model folder to write.")
@click.option("--measure", "measured", type=_PATH, help="Only measure this sparse model against MODEL.")
@click.option("--firing", default="15%", show_default=True, callback=_share, help="Share of neurons that may fire.")
@click.option("--minutes", type=float, default=Settings.minutes, show_default=True, help="Train so long.")
@click.option("--steps", type=int, help="Train so many steps, or --minutes, whichever is over first.")
@click.option("--rank", default="32", show_default=True, callback=_rank, help="Of each matrix's difference, or full.")
@click.option("--gate-rank", type=click.IntRange(1), help="Of the gates' difference.  [default: --rank]")
@click.option("--bits", type=click.IntRange(2, 8), default=Options.bits, show_default=True, help="Of difference.npz.")
@click.option("--start", type=_PATH, help="A difference.npz to begin with.")
@click.option("--batch", type=int, default=Settings.batch, show_default=True, help="Windows per step.")
@click.option("--context", type=int, default=Settings.context, show_default=True, help="Tokens per window.")
@click.option("--rate", type=float, default=Settings.rate, show_default=True, help="Length of Adam's steps.")
@click.option("--descent", type=float, default=Settings.descent, show_default=True, help="When --firing is reached.")
@click.option("--blend", type=float, default=Settings.blend, show_default=True, help="When SiLU has faded out.")
@click.option("--cooldown", type=float, default=Settings.cooldown, show_default=True, help="Share of time, at the end.")
@click.option("--label-weight", type=float, default=0.0, show_default=True, help="Of the text's own next tokens.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--save-minutes", type=float, default=Options.save_minutes, show_default=True, help="Between checkpoints."
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(model: Path, corpus: tuple[Path, ...], held_out: tuple[Path, ...], out: Path | None, **given: Any) -> None:
    """Command line of this script."""
    try:
        report = run(model, corpus, held_out, out, **given)
    except HybridError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(130)
    click.echo(report.text())


def run(
    model: Path,
    corpus: tuple[Path, ...],
    held_out: tuple[Path, ...],
    out: Path | None,
    measured: Path | None,
    device: str,
    held_out_windows: int,
    **given: Any,
) -> Report:
    """What the command line asks for. Raises `InputError` or a subclass, before any training, for bad input."""
    if (out is None) == (measured is None):
        raise InputError("give -o OUT to make a model, or --measure FOLDER to measure one")
    if out is not None and out.exists():
        raise InputError(f"{out} already exists; move it away or choose another folder with -o")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device; pass --device cpu for a trial of a few steps")
    options = Options(**{each.name: given.pop(each.name) for each in fields(Options)})
    settings = Settings(**given)
    torch.set_float32_matmul_precision("high")
    base = load_base(model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    text = Text.read(model, base.spec, corpus, held_out, held_out_windows, settings.context)
    if measured is not None:
        return measure_folder(measured, base, text.held_out)
    assert out is not None
    return relufy(model, out, text, base, settings, options)


if __name__ == "__main__":
    main()
