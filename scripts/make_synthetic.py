"""Write a ReGLU Llama of any shape with chosen firing rates, and its exact predictors, profile and placement; or with
`--activation silu` a SwiGLU one, of which so many neurons pass their proxies.

    python scripts/make_synthetic.py --out OUT --d-model 2048 --d-ff 8192 --layers 16 --heads 16

OUT is a Hugging Face folder, ready for `hybrid chat OUT` and `hybrid generate OUT`. The text that the model writes is
noise; what is true to life is the work per token: which neurons fire, how often, how well a predictor can tell.
`synthetic_model.py` has the construction. Greedy text never ends by itself. Profile and report are measured on random
tokens other than those that set the firing rates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from synthetic_model import (
    NORM_EPS,
    SPECIAL_TOKENS,
    TORCH_DTYPES,
    MeasuredLayer,
    ModelMaker,
    SyntheticConfig,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from train_tiny import new_folder

from hybrid.console import progress
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.offline.project import Project
from hybrid.offline.proxies import Proxies
from hybrid.reports import predictor_report, profile_report
from placement.placement import PlacementSettings
from placement.plan import parse_size
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from predictor.proxy_fit import ProxyFit
from predictor.report import PredictorReport, Quality, overall_counts
from predictor.target import PredictorTarget
from profiler.common.artifact import atomic_write
from profiler.common.errors import HybridError, InputError
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import RopeSpec, Strategy
from profiler.profile import NeuronProfile


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_text_files(folder: Path, config: SyntheticConfig) -> None:
    """Config, generation config and tokenizer: special tokens, all bytes, and filler words up to the vocabulary's size.

    There are no merges, so a text is encoded byte by byte. The chat template is the embedded model's.
    """
    entries = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"\u0120w{number}" for number in range(config.vocab - len(entries))]  # U+0120 stands for a space
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = json.loads((EMBEDDED_MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", named | {"model_max_length": config.context})
    ids = {f"{name}_token_id": SPECIAL_TOKENS.index(named[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", ids | {"do_sample": False})
    write_json(folder / "config.json", model_config(config) | ids)


def model_config(config: SyntheticConfig) -> dict[str, Any]:
    """The fields of a Hugging Face `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": config.activation,
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": RopeSpec().theta,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": False,
        "torch_dtype": str(TORCH_DTYPES[config.dtype]).removeprefix("torch."),
    }


def write_weights(folder: Path, maker: ModelMaker) -> list[MeasuredLayer]:
    """Draw and write all weights, one shard for the ends and one per layer; returns what was measured of the layers."""
    shards, layers = maker.config.layers + 1, []
    weight_map: dict[str, str] = {}

    def write(tensors: Mapping[str, torch.Tensor], number: int) -> None:
        path = folder / f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        path.chmod(0o644)
        weight_map.update(dict.fromkeys(tensors, path.name))

    write(maker.ends(), 1)
    with progress("weights", maker.config.layers, "layer") as advance:
        for number in range(maker.config.layers):
            tensors, measured = maker.layer(number)
            write(tensors, number + 2)
            layers.append(measured)
            advance(1)
    index = {"metadata": {"total_size": maker.config.n_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return layers


def write_artefacts(
    folder: Path, maker: ModelMaker, layers: Sequence[MeasuredLayer], settings: PlacementSettings
) -> tuple[NeuronProfile, PredictorBank | ProxyBank]:
    """Write profile, predictors or proxies, and placement of the model in `folder`; returns the first two."""
    project, config = Project(folder, None, None, progress), maker.config
    profile = measured_profile(maker, layers, project)
    profile.save(project.bundle.profile)
    if config.activation != "relu":
        return profile, write_proxies(project, profile, config, settings)
    bank = PredictorBank(tuple(layer.predictor for layer in layers))
    # What the construction promises: no loss, nearly nothing predicted in vain, at the bytes that the rank takes.
    target = PredictorTarget(1e-4, 1.05, min(1.0, sum(bank.bytes_per_layer) / project.spec.model_bytes))
    origin = project.train_origin(profile.header, target, maker.config.seed) | {"exact_by_construction": True}
    report = quality_report(layers, profile.tokens)
    bank.save(project.bundle.predictors, project.spec, origin, report)
    with atomic_write(project.bundle.report) as file:
        file.write(report.to_json().encode())
    bank = project.load_predictors()
    project.write_placement(project.place(profile, bank, HardwareProfile.load(), settings).placement)
    return profile, bank


def write_proxies(
    project: Project, profile: NeuronProfile, config: SyntheticConfig, settings: PlacementSettings
) -> ProxyBank:
    """Write proxies that let `firing_share` of the neurons pass, and the placement."""
    by, spec = Proxies(project, progress), project.spec
    layers = [project.ffn_weights(layer) for layer in range(spec.n_layers)]
    fit = ProxyFit.of(spec, by.copies(), layers, profile.inputs, config.seed, progress)
    target = PredictorTarget(1.0)  # random text has no perplexity to keep
    by.write(fit.finished(1 - config.firing_share, None, target, progress), profile.header, target, config.seed)
    bank = by.load_predictors()
    project.write_placement(project.place(profile, bank, HardwareProfile.load(), settings).placement)
    return bank


def measured_profile(maker: ModelMaker, layers: Sequence[MeasuredLayer], project: Project) -> NeuronProfile:
    """The profile over the measured tokens; the tokens that set the firing rates are its validation windows."""
    calibration, measured = maker.tokens.numpy().reshape(2, -1, maker.tokens.shape[1]).astype(np.int32)
    window = measured.shape[1]
    origin = {"corpus": "synthetic", "corpus_files": ["random token ids"], "tokens": measured.size, "window": window}
    firings, inputs = np.stack([layer.firings for layer in layers]), np.stack([layer.inputs for layer in layers])
    documents = (maker.sampled // window).astype(np.int32)
    header = NeuronProfile.make_header(project.spec, origin | asdict(maker.config))
    return NeuronProfile(header, firings, measured.size, inputs, documents, calibration)


def quality_report(layers: Sequence[MeasuredLayer], tokens: int) -> PredictorReport:
    """The predictors' report, as measured. Raises `HybridError` if one of them missed a firing."""
    lines = [
        Quality.of(str(number), layer.predictor.rank, layer.predictor.nbytes, layer.quality)
        for number, layer in enumerate(layers)
    ]
    for line in lines:
        if line.recall < 1:
            raise HybridError(f"the predictor of layer {line.layer} has recall {line.recall}, expected 1; report this")
    total = overall_counts([layer.quality for layer in layers])
    overall = Quality.of("all", sum(line.rank for line in lines), sum(line.bytes for line in lines), total)
    return PredictorReport(tuple(lines), overall, curve=(), tokens=tokens, level=0.0)


def make_synthetic(
    config: SyntheticConfig, out: Path, vram_budget: str = "unlimited", device: str = "cpu"
) -> tuple[NeuronProfile, PredictorBank | ProxyBank]:
    """Write the model and its artefacts to the new folder `out`; returns profile and predictors or proxies.

    Raises `InputError` or a subclass, before any work, when it cannot be done; nothing is left of a run that fails.
    """
    if out.exists():
        raise InputError(f"{out} already exists; move it away or choose another folder as --out")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device; pass --device cpu")
    strategy: Strategy = "learned" if config.activation == "relu" else "proxy"
    settings = PlacementSettings(parse_size(vram_budget), config.context, strategy)
    settings.planned_bytes(HardwareProfile.load())
    with torch.inference_mode(), new_folder(out, config.n_bytes, "--out", replaces=False) as folder:
        write_text_files(folder, config)
        maker = ModelMaker(config, device)
        return write_artefacts(folder, maker, write_weights(folder, maker), settings)


def write_gguf(folder: Path, kind: str) -> None:
    """Write the weights of the model in `folder` to `model-<kind>.gguf` there."""
    import gguf_model  # needs packages that nothing else here does

    gguf_model.write_gguf(folder, folder / f"model-{kind}.gguf", kind)


@click.command(help="Write a ReGLU Llama with chosen firing rates, and its exact predictors, profile and placement.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder to write.")
@click.option("--d-model", type=int, default=SyntheticConfig.d_model, show_default=True)
@click.option("--d-ff", type=int, default=SyntheticConfig.d_ff, show_default=True, help="Neurons per layer.")
@click.option("--layers", type=int, default=SyntheticConfig.layers, show_default=True)
@click.option("--heads", type=int, default=SyntheticConfig.heads, show_default=True)
@click.option("--kv-heads", type=int, help="Heads for keys and values.  [default: as many as heads]")
@click.option("--vocab", type=int, default=SyntheticConfig.vocab, show_default=True)
@click.option("--dtype", type=click.Choice(list(TORCH_DTYPES)), default=SyntheticConfig.dtype, show_default=True)
@click.option("--context", type=int, default=SyntheticConfig.context, show_default=True)
@click.option("--seed", type=int, default=SyntheticConfig.seed, show_default=True)
@click.option(
    "--activation", type=click.Choice(["relu", "silu"]), default=SyntheticConfig.activation, show_default=True
)
@click.option(
    "--firing-share",
    type=float,
    default=SyntheticConfig.firing_share,
    show_default=True,
    help="Of the neurons; with silu, those that proxies let pass.",
)
@click.option(
    "--skew",
    type=float,
    default=SyntheticConfig.skew,
    show_default=True,
    help="Firing rates are proportional to (rank + 10)^-skew.",
)
@click.option("--predictor-rank", type=int, help="Hidden units of each predictor.  [default: d-model / 8]")
@click.option("--vram-budget", default="unlimited", show_default=True, help="Of the placement, such as 8GiB.")
@click.option(
    "--gguf",
    "gguf_kinds",
    type=click.Choice(["f16", "q4_0"]),
    multiple=True,
    help="Also write OUT/model-KIND.gguf, for llama.cpp; may be given twice.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(out: Path, vram_budget: str, gguf_kinds: Sequence[str], device: str, **settings: Any) -> None:
    """Command line of this script."""
    try:
        profile, bank = make_synthetic(SyntheticConfig(**settings), out, vram_budget, device)
        for kind in gguf_kinds:
            write_gguf(out, kind)
        click.echo(f"{profile_report(profile)}\n\n{predictor_report(bank)}\n\nwrote {out}")
    except HybridError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
