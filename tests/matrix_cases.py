"""Random weight matrices of every stored type, and how far a kernel's product with them may be from the exact one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from cpu_kernels.matrix import DType, Matrix

DTYPES: tuple[DType, ...] = ("f32", "bf16", "f16", "int8", "int4")
SHAPES = [(1, 1), (3, 17), (65, 17), (300, 384), (129, 1023), (129, 4095)]
THREADS = (1, 2, 3, 7)
ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "fatrelu_0.3", "drelu")

_TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def stored(weight: torch.Tensor, dtype: DType) -> Matrix:
    """`weight` [n, d] f32 as rows of `dtype`."""
    return Matrix.of(weight, dtype) if dtype in ("int8", "int4") else Matrix.of(weight.to(_TORCH[dtype]))


@lru_cache(16)
def random_matrix(n: int, d: int, dtype: DType, seed: int = 0, scale: float = 1.0) -> Matrix:
    """Shared between tests, which must not write to it."""
    generator = torch.Generator().manual_seed(31 * n + d + 7919 * seed)
    return stored(torch.randn(n, d, generator=generator) * scale, dtype)


def random_input(tokens: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([tokens, d, seed]).standard_normal((tokens, d)).astype(np.float32)


@lru_cache(8)
def in_f64(matrix: Matrix) -> np.ndarray:
    """The weights [n, d] f64; shared as above."""
    return matrix.widen().double().numpy()


def product_bound(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """The largest error [t, n] of matrix . x[t] that arithmetic in f32 explains.

    Floats: 1e-6 of the sum of |w x|. Blocks: an input is rounded to 1 / 65,534 = 1.5e-5 of its block's largest, so 2e-5
    of the sum of |w| times that, which leaves 0.5e-5 for the sums.
    """
    weight, x = np.abs(in_f64(matrix)), np.abs(x.astype(np.float64))
    if matrix.dtype not in ("int8", "int4"):
        return 1e-6 * x @ weight.T
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    largest = np.repeat(blocks.max(-1), 32, axis=1)[:, : x.shape[1]]
    return 2e-5 * largest @ weight.T


def rounded_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales f32 [...] of keys or values x [..., head_dim] kept in int8, to the bit."""
    scales = x.abs().amax(-1) / 127
    divisors = torch.where(scales > 0, scales, 1.0)
    return (x / divisors[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales
