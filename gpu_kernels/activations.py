"""The FFN activations: in Triton kernels, by their words of `cpu_kernels/contract.py`, and in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cpu_kernels.contract import split_activation

NO_ACTIVATION = -1


@triton.jit
def activate(word: tl.constexpr, z):  # type: ignore[no-untyped-def]
    """The activation `word` of f32 values, of gate, or of up where there is no gate; below 0 for none."""
    code: tl.constexpr = word % 256 if word >= 0 else -1
    if code == 0 or code == 6:
        z = tl.maximum(z, 0.0)
    elif code == 1:
        z = tl.maximum(z, 0.0) * z
    elif code == 2:
        z = z / (1.0 + tl.exp(-z))
    elif code == 3:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif code == 4:
        # 0.5 z (1 + tanh(u)) is z / (1 + exp(-2 u)), which loses no digits where u is near 0.
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif code == 5:
        threshold = tl.full([], word // 256, tl.int32).to(tl.float32, bitcast=True)
        z = tl.where(z > threshold, z, 0.0)
    return z


@triton.jit
def activate_up(word: tl.constexpr, u):  # type: ignore[no-untyped-def]
    """What the gate's activation is multiplied with: up, or its ReLU."""
    if word == 6:
        u = tl.maximum(u, 0.0)
    return u


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
