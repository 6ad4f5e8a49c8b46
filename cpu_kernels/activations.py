"""The FFN activations: in compiled kernels, by their words of `contract.py`, and by the same formulas in torch."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from cpu_kernels.contract import split_activation


@njit(nogil=True, inline="always")
def activate(word, z):  # type: ignore[no-untyped-def]
    """The activation `word` of one f32 pre-activation: of gate, or of up where there is no gate."""
    code = word & 255
    if code == 0 or code == 6:
        return max(z, np.float32(0))
    if code == 1:
        return max(z, np.float32(0)) * z
    if code == 2:
        return np.float32(z / (1 + math.exp(-z)))
    if code == 3:
        return np.float32(0.5 * z * (1 + math.erf(z / math.sqrt(2.0))))
    if code == 5:
        return z if z > np.int32(word >> 8).view(np.float32) else np.float32(0)
    return np.float32(0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))))


@njit(nogil=True, inline="always")
def activate_up(word, u):  # type: ignore[no-untyped-def]
    """What the gate's activation is multiplied with: up, or its ReLU."""
    return max(u, np.float32(0)) if word == 6 else u


def activate_ref(name: str, z: torch.Tensor) -> torch.Tensor:
    """The activation `name` in torch; raises `ValueError` for an unknown name."""
    base, threshold = split_activation(name)
    functions = {
        "relu": F.relu,
        "relu2": lambda t: F.relu(t).square(),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "fatrelu": lambda t: F.threshold(t, threshold, 0.0),
        "drelu": F.relu,
    }
    return functions[base](z)


def activate_up_ref(name: str, up: torch.Tensor) -> torch.Tensor:
    """`activate_up` in torch."""
    return F.relu(up) if name == "drelu" else up
