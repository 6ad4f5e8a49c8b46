"""Packing a model folder in tests."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from hybrid.formats.bundle import Bundle
from hybrid.model.loader import ModelFolder
from hybrid.offline.pack import Packer
from placement.placement import Placement


@contextmanager
def quiet(label, total, unit):
    yield lambda count: None


def pack(model, out, dtype="int8"):
    folder = ModelFolder.open(model)
    return Packer(folder, Bundle.of(folder.path, folder.spec), dtype, quiet).pack(out)


def place(model, seed=1):
    """Save a placement with a random order; returns that order."""
    spec = ModelFolder.open(model).spec
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(spec.d_ff) for _ in range(spec.n_layers)]).astype(np.int32)
    hot = np.full(spec.n_layers, 5, np.int32)
    placement = Placement(order, hot, np.ones(spec.n_layers, bool), True, spec.fingerprint)
    placement.save(model / "hybrid" / "placement.safetensors")
    return order
