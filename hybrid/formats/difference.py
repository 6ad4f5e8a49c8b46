"""A model as the difference from another: a low-rank one for each matrix, rounded to few bits, and new vectors whole.

    W' = W + sum_k scale[k] * outer(out[k], in[k])

`out` and `in` are small integers, stored as int8 in a deflated .npz, which packs n-bit numbers to little over their
entropy. Before they are rounded, both factors of a product get the singular values' square roots, so that each
direction loses the same share.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profiler.common.artifact import atomic_write
from profiler.common.errors import InputError


def rounded(into: torch.Tensor, out: torch.Tensor, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`in` int8 [r, m], `out` int8 [r, n] and `scale` f32 [r] of the product out [n, r] @ into [r, m]."""
    out_basis, out_part = torch.linalg.qr(out.float())
    in_basis, in_part = torch.linalg.qr(into.float().T)
    left, sizes, right = torch.linalg.svd(out_part @ in_part.T)
    largest, factors, scale = 2 ** (bits - 1) - 1, [], sizes
    for factor in ((in_basis @ right.T).T, (out_basis @ left).T):
        step = factor.abs().amax(dim=1) / largest
        factors.append((factor / step[:, None]).round().to(torch.int8).numpy())
        scale = scale * step
    return factors[0], factors[1], scale.numpy()


def write_difference(
    path: Path,
    products: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    vectors: Mapping[str, torch.Tensor],
    bits: int,
) -> None:
    """products: by the matrix's name the factors [r, m] and [n, r] of its difference; vectors: by name what replaces
    it. Raises `ArtifactError` when the file cannot be written."""
    arrays: dict[str, Any] = {f"{name}.vector": vector.float().numpy() for name, vector in vectors.items()}
    for name, (into, out) in products.items():
        parts = rounded(into, out, bits)
        arrays |= {f"{name}.{part}": array for part, array in zip(("in", "out", "scale"), parts, strict=True)}
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


@dataclass(eq=False)
class Difference:
    """What a file holds; `unused` are the names that `applied` has not met."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    unused: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unused = {name.rpartition(".")[0] for name in self.arrays}

    @classmethod
    def load(cls, path: Path) -> Difference:
        """Raises `InputError` for a file that is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(path, dict(stored))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read ({error}); install this package again") from error

    def applied(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` with its difference, in its own type. Raises `InputError` when the shapes do not fit."""
        self.unused.discard(name)
        try:
            if f"{name}.vector" in self.arrays:
                return torch.from_numpy(self.arrays[f"{name}.vector"]).reshape(weight.shape).to(weight.dtype)
            if f"{name}.scale" not in self.arrays:
                return weight
            scale, into, out = (torch.from_numpy(self.arrays[f"{name}.{part}"]) for part in ("scale", "in", "out"))
            return (weight.float() + (out.float().T * scale) @ into.float()).to(weight.dtype)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{self.path} does not fit tensor '{name}' {list(weight.shape)}: {error}") from error
