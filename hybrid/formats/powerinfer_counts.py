"""PowerInfer's activation statistics: `activation/activation_{layer}.pt`, each a tensor of one layer's firing counts.

They are pickles in a zip archive, as torch writes them; no code in them is run, and nothing is read that is larger than
such a tensor can be.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch

from hybrid.errors import ModelError
from profiler.common.errors import shown

FOLDER = "activation"
_MOST = 2.0**40  # firings of a neuron: sums of them over a model stay whole numbers
_MOST_LAYERS = 256
_OVERHEAD = 2**16  # bytes of a file besides its numbers


def read_counts(folder: Path, layers: int, neurons: int) -> np.ndarray:
    """int64 [layers, neurons] from the files in `folder`. Raises `ModelError` for one that holds something else."""
    return np.stack([_read(path, neurons) for path in _paths(folder, layers)])


def digest_of_counts(folder: Path, layers: int, neurons: int) -> str | None:
    """16 hex digits of these files' bytes; None without `folder`. Raises `ModelError` for a missing file."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in _paths(folder, layers):
        try:
            with path.open("rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(_most_bytes(neurons)))
        except OSError as error:
            raise _unreadable(path, error) from error
    return digest.hexdigest()[:16]


def _paths(folder: Path, layers: int) -> list[Path]:
    return [folder / f"activation_{layer}.pt" for layer in range(layers)]


def _most_bytes(neurons: int) -> int:
    """Of a file; one that was cut out of all layers' counts holds them all."""
    return 8 * neurons * _MOST_LAYERS + _OVERHEAD


def _read(path: Path, neurons: int) -> np.ndarray:
    tensor = _loaded(path, neurons)
    if not isinstance(tensor, torch.Tensor):
        raise _wrong(path, f"holds a {type(tensor).__name__}", neurons)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _wrong(path, "holds no plain tensor", neurons)
    if tensor.shape != (neurons,):
        raise _wrong(path, f"has shape {shown(list(tensor.shape))}", neurons)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise _wrong(path, f"is of type {tensor.dtype}", neurons)
    values = tensor.detach().to(torch.float64).numpy()
    bad = ~((values >= 0) & (values <= _MOST) & (values == np.floor(values)))
    if bad.any():
        raise _wrong(path, f"has {shown(float(values[bad][0]))}", neurons)
    return values.astype(np.int64)


def _loaded(path: Path, neurons: int) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            nbytes = sum(member.file_size for member in archive.infolist())
        if nbytes > _most_bytes(neurons):
            raise _wrong(path, f"has {nbytes:,} bytes", neurons)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ModelError:
        raise
    except Exception as error:  # of any kind: what is in the file decides
        raise _wrong(path, f"cannot be read ({type(error).__name__})", neurons) from error


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot read {path}: {error.strerror or error}; fetch all of the model's {FOLDER} folder")


def _wrong(path: Path, problem: str, neurons: int) -> ModelError:
    return ModelError(
        f"{path} {problem}, expected whole counts of {neurons} neurons; fetch it again, or remove {FOLDER}"
    )
