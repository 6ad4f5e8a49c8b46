"""The run-time form of a GGUF model of Q8_0 or Q4_0, written once beside its other artefacts and then mapped.

There is one file for neurons in the GGUF file's order, as profiling has them, and one for the placement's. Either is
made anew where the model or the order is another. Threads as in `hybrid pack`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from hybrid.console import progress, size
from hybrid.errors import ArtifactError, InputError, ModelError
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.formats.packed import ALIGNMENT, PackedModel, TensorMap, order_hash, parts
from hybrid.model.coders import coders, in_order
from hybrid.model.gguf_parts import BlockParts
from profiler.common.artifact import ArtifactHeader, TensorWriter, atomic_write, open_artifact
from profiler.common.spec import ModelSpec

KIND = "run-time form"
REPAIR = "run the model once more"


def open_run_form(spec: ModelSpec, checkpoint: GGUFCheckpoint, order: np.ndarray | None, folder: Path) -> PackedModel:
    """The model's parts in their run-time form, mapped, from `folder`, where they are written if they are not there.

    order: of the neurons, [n_layers, d_ff]; None: as in the GGUF file. Raises `InputError` or `ArtifactError` where
    they cannot be written, `ModelError` for weights that are no numbers.
    """
    natural = np.tile(np.arange(spec.d_ff, dtype=np.int32), (spec.n_layers, 1))
    made = BlockParts(spec, checkpoint, natural if order is None else order)
    path = folder / f"run-{spec.dtype}{'' if np.array_equal(made.order, natural) else '-placed'}.safetensors"
    header = ArtifactHeader(KIND, spec.fingerprint, {"dtype": spec.dtype, "order": order_hash(made.order)})
    try:
        return _mapped(path, made, header)
    except (ArtifactError, ModelError):
        _write(path, made, header)
    return _mapped(path, made, header)


def _mapped(path: Path, made: BlockParts, header: ArtifactHeader) -> PackedModel:
    """The file at `path`, if `header` is its own. Raises `ArtifactError` or `ModelError` for another."""
    with open_artifact(path, KIND, header.model_fingerprint, REPAIR) as file:
        if file.header.key != header.key:
            raise ArtifactError(f"{path} has another order; {REPAIR}")
        return PackedModel(path.parent, made.spec, file.header, TensorMap.of(file, list(parts(made.spec))))


def _write(path: Path, made: BlockParts, header: ArtifactHeader) -> None:
    wanted = list(parts(made.spec))
    needed = sum(part.nbytes for part in wanted)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.is_file() else 0)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; name another folder with --bundle"
        ) from error
    if free < needed:
        raise InputError(
            f"{path}, the form in which the model runs, needs {size(needed)}, {size(free)} are free there; "
            "name another folder with --bundle"
        )
    with (
        atomic_write(path) as file,
        progress("first start: writing the run-time form", needed, "byte") as advance,
        coders() as threads,
    ):
        writer = TensorWriter(file, header, [part.entry for part in wanted], ALIGNMENT)
        for part in wanted:
            try:
                writer.add(part.name, in_order(made.tasks(part), threads))
            except ValueError as error:
                raise ModelError(f"{made.checkpoint.folder}: weights for '{part.name}': {error}") from error
            advance(part.nbytes)
        writer.finish()
