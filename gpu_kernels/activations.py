"""The FFN activations: in Triton kernels, by their codes in `cpu_kernels/contract.py`, and in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

NO_ACTIVATION = -1


@triton.jit
def activate(code: tl.constexpr, z):  # type: ignore[no-untyped-def]
    """The activation numbered `code` of f32 values; below 0 for none."""
    if code == 0:
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
    return z


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
