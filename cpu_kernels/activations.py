"""The FFN activations: in compiled kernels, by their codes in `contract.py`, and by the same formulas in torch."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit


@njit(nogil=True, inline="always")
def activate(code, z):  # type: ignore[no-untyped-def]
    """The activation numbered `code` of one f32 pre-activation."""
    if code == 0:
        return max(z, np.float32(0))
    if code == 1:
        return max(z, np.float32(0)) * z
    if code == 2:
        return np.float32(z / (1 + math.exp(-z)))
    if code == 3:
        return np.float32(0.5 * z * (1 + math.erf(z / math.sqrt(2.0))))
    return np.float32(0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))))


def activate_ref(name: str, z: torch.Tensor) -> torch.Tensor:
    """The activation `name` in torch; raises `KeyError` for an unknown name."""
    functions = {
        "relu": F.relu,
        "relu2": lambda t: F.relu(t).square(),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }
    return functions[name](z)
