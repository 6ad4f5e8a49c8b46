"""Write the dense GGUF of a Llama-family model folder, for llama.cpp to run beside this project.

    python scripts/gguf_model.py MODEL OUT.gguf --type f16|f32|q8_0|q4_0

f16, f32 and q8_0 files are written tensor by tensor; vectors are f32 in the last. q4_0 is llama.cpp's own conversion of
the f16 file, so that it holds what its users run: blocks of 4 bits, and the output matrix in q6_K, which the gguf
package cannot write.

llama.cpp has no dense architecture with a gated ReLU: it runs such weights with silu. The work per token is the same,
the text is not. `hybrid.hidden_act`, a key of our own, says to `hybrid` what the model computes. llama.cpp's RoPE turns
neighbouring elements where Hugging Face's turns halves, so rows of q and k are moved.
Tokens are listed so that the file loads; where the model's tokenizer cuts texts otherwise than GPT-2's, feed token ids
to llama.cpp. The whole tokenizer.json goes along, which `hybrid` reads.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tokenizers import Tokenizer

from hybrid.console import progress
from hybrid.errors import HybridError, InputError
from hybrid.formats.config import read_json
from hybrid.formats.gguf_architectures import ACTIVATION_KEY
from hybrid.model.loader import ModelFolder
from hybrid.model.rope import rope_frequencies
from profiler.common.spec import ModelSpec, RopeSpec

KINDS = ("f16", "f32", "q8_0", "q4_0")
_ARRAY_TYPES = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
_INSTALL = "install the peer packages: pip install hybrid-inference[peers]"


@dataclass(frozen=True)
class Part:
    """A tensor to write: its GGUF name, the checkpoint's name, its shape, and heads whose rows RoPE turns (0: none)."""

    name: str
    source: str
    shape: tuple[int, ...]
    rotated_heads: int = 0

    def of_layer(self, layer: int) -> Part:
        name, source = f"blk.{layer}.{self.name}", f"model.layers.{layer}.{self.source}"
        return replace(self, name=f"{name}.weight", source=f"{source}.weight")


def parts(spec: ModelSpec) -> list[Part]:
    """Every tensor of the model, in the order of the file."""
    d, f, q, kv = spec.d_model, spec.d_ff, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    layer = [
        Part("attn_norm", "input_layernorm", (d,)),
        Part("attn_q", "self_attn.q_proj", (q, d), spec.n_heads),
        Part("attn_k", "self_attn.k_proj", (kv, d), spec.n_kv_heads),
        Part("attn_v", "self_attn.v_proj", (kv, d)),
        Part("attn_output", "self_attn.o_proj", (d, q)),
        Part("ffn_norm", "post_attention_layernorm", (d,)),
        Part("ffn_gate", "mlp.gate_proj", (f, d)),
        Part("ffn_up", "mlp.up_proj", (f, d)),
        Part("ffn_down", "mlp.down_proj", (d, f)),
    ]
    ends = [
        Part("token_embd.weight", "model.embed_tokens.weight", (spec.vocab_size, d)),
        Part("output_norm.weight", "model.norm.weight", (d,)),
    ]
    head = [] if spec.tied else [Part("output.weight", "lm_head.weight", (spec.vocab_size, d))]
    return ends + head + [part.of_layer(number) for number in range(spec.n_layers) for part in layer]


def check_family(spec: ModelSpec) -> None:
    """Raise `InputError` where this writer would leave out something that the model computes."""
    plain = spec.family in ("llama", "mistral") and spec.gated and spec.sliding_window is None
    if not plain or spec.qkv_bias or spec.out_bias or spec.ffn_bias or spec.qk_norm:
        raise InputError(
            f"GGUF is written for Llama and Mistral without biases or sliding window, this is a {spec.family} model "
            "with something else; use llama.cpp's own converter"
        )


def tensor_values(folder: ModelFolder, part: Part, dtype: np.dtype) -> np.ndarray:
    """The values of `part` as they go to the file. Raises `InputError` for a value that f16 cannot hold."""
    weight = folder.checkpoint.tensor(part.source, part.shape)
    if part.rotated_heads:
        # Row j of the first half of a head and row j of the second become neighbours.
        weight = weight.view(part.rotated_heads, 2, -1, part.shape[1]).transpose(1, 2).reshape(part.shape)
    values = weight.to(torch.float16 if dtype == np.float16 else torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise InputError(f"tensor '{part.source}' has values that {dtype} cannot hold; write f32")
    return values


def rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """What each pair's angle is divided by, f32 [head_dim / 2], where RoPE is scaled as Llama 3's is."""
    if spec.rope is None or spec.rope.kind != "llama3":
        return None
    plain = RopeSpec(theta=spec.rope.theta)
    return (rope_frequencies(plain, spec.head_dim) / rope_frequencies(spec.rope, spec.head_dim)).numpy()


def token_list(folder: Path, size: int) -> tuple[list[str], list[bool], list[str]]:
    """Tokens by id, whether each is special, and merges; a vocabulary larger than the tokenizer's is filled up with
    names of no meaning."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [known.get(number, f"[unused{number}]") for number in range(size)]
    added = tokenizer.get_added_tokens_decoder()
    special = [number in added and added[number].special for number in range(size)]
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"].get("merges") or []
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stored]
    return tokens, special, merges or [f"{tokens[0]} {tokens[1]}"]  # an empty list cannot be written


def cuts_as_gpt2(folder: Path) -> bool:
    """Whether the model's tokenizer cuts a text before its merges as GPT-2's does: all that this script can name."""
    pre = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    return pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")


def new_writer(folder: ModelFolder, path: Path, kind: str) -> Any:
    """A `GGUFWriter` with all metadata of the model. Raises `InputError` where the gguf package is missing."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"writing GGUF needs the gguf package; {_INSTALL}") from error
    spec, writer = folder.spec, gguf.GGUFWriter(path, "llama")
    rope = spec.rope or RopeSpec()
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.d_model)
    writer.add_block_count(spec.n_layers)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    writer.add_vocab_size(spec.vocab_size)
    types = {"f16": "MOSTLY_F16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_string(ACTIVATION_KEY, spec.activation)
    add_tokenizer(folder, writer, gguf)
    return writer


def add_tokenizer(folder: ModelFolder, writer: Any, gguf: Any) -> None:
    """The tokenizer, its start and end tokens and the chat template."""
    tokens, special, merges = token_list(folder.path, folder.spec.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if cuts_as_gpt2(folder.path) else "default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if each else gguf.TokenType.NORMAL for each in special])
    writer.add_token_merges(merges)
    writer.add_string(gguf.Keys.Tokenizer.HF_JSON, (folder.path / "tokenizer.json").read_text(encoding="utf-8"))
    writer.add_add_bos_token(False)
    named = folder.path / "tokenizer_config.json"
    texts = read_json(named) if named.is_file() else {}
    if (start := folder.codec.token_id(str(texts.get("bos_token")))) is not None:
        writer.add_bos_token_id(start)
    ends = dict.fromkeys((*folder.codec.eos_tokens(), *folder.defaults.end_tokens))
    for end, add in zip(
        ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(end)
    if isinstance(texts.get("chat_template"), str):
        writer.add_chat_template(texts["chat_template"])


def write_tensors(folder: ModelFolder, path: Path, kind: str) -> None:
    """Write the file as f16, f32 or q8_0, one tensor in memory at a time.

    Norms are f32 in all, and rows that are no whole blocks of 32 are f16 among q8_0.
    """
    writer, factors = new_writer(folder, path, kind), rope_factors(folder.spec)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    table = [(part, stored_type(part, kind)) for part in parts(folder.spec)]
    for part, stored in table:
        add_info(writer, part, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    with progress(f"gguf {kind}", len(table), "tensor") as advance:
        for part, stored in table:
            writer.write_tensor_data(encoded(folder, part, stored))
            advance(1)
    writer.close()


def stored_type(part: Part, kind: str) -> str:
    """The type that `part` has in a file of `kind`."""
    if len(part.shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and part.shape[1] % 32 else kind


def add_info(writer: Any, part: Part, stored: str) -> None:
    """Announce a tensor, of blocks by the bytes of its rows."""
    from gguf import GGMLQuantizationType

    if stored == "q8_0":
        shape = (part.shape[0], part.shape[1] // 32 * 34)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), int(np.prod(shape)), GGMLQuantizationType.Q8_0)
    else:
        dtype = _ARRAY_TYPES[stored]
        writer.add_tensor_info(part.name, part.shape, dtype, int(np.prod(part.shape)) * dtype.itemsize)


def encoded(folder: ModelFolder, part: Part, stored: str) -> np.ndarray:
    """The bytes of a tensor."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as quantized

    if stored == "q8_0":
        return quantized(tensor_values(folder, part, _ARRAY_TYPES["f32"]), GGMLQuantizationType.Q8_0)
    return tensor_values(folder, part, _ARRAY_TYPES[stored])


def quantize(source: Path, target: Path) -> None:
    """llama.cpp's own Q4_0 of an f16 file. Raises `InputError` without llama-cpp-python, `HybridError` if it fails."""
    try:
        import llama_cpp
    except ImportError as error:
        raise InputError(f"q4_0 needs llama-cpp-python; {_INSTALL}") from error
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    if failed:
        raise HybridError(f"llama.cpp could not quantise {source.name} (status {failed}); is there room on the disk?")


@contextmanager
def _temporary(beside: Path) -> Iterator[Path]:
    """A path in the same folder that is gone afterwards, unless it was renamed."""
    path = beside.with_name(f"{beside.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def write_gguf(model: Path, out: Path, kind: str) -> None:
    """Write the model in the folder `model` to the file `out`, replacing it when all is written.

    Raises `InputError` or a subclass for a model or a `kind` that cannot be written, or missing packages.
    """
    if kind not in KINDS:
        raise InputError(f"unknown type {kind!r}, expected one of {', '.join(KINDS)}")
    folder = ModelFolder.open(model)
    check_family(folder.spec)
    with _temporary(out) as written, _temporary(out) as quantized:
        write_tensors(folder, written, "f16" if kind == "q4_0" else kind)
        if kind == "q4_0":
            quantize(written, quantized)
        os.replace(quantized if kind == "q4_0" else written, out)


@click.command(help="Write the dense GGUF of a Llama-family model folder.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--type", "kind", type=click.Choice(KINDS), default="f16", show_default=True)
def main(model: Path, out: Path, kind: str) -> None:
    """Command line of this script."""
    try:
        write_gguf(model, out, kind)
        activation = ModelFolder.open(model).spec.activation
    except HybridError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if activation != "silu":
        click.echo(f"note: llama.cpp computes silu where this model has {activation}: same work, other text", err=True)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
