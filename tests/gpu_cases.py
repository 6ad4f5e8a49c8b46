"""What the tests of GPU kernels share: the device, random matrices of every kind, and a check with its mismatches."""

import torch

from cpu_kernels.matrix import Matrix
from gpu_kernels.matrix import KINDS, DeviceMatrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU Triton interprets
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def random_matrix(n: int, columns: int, kind: str, seed: int = 0) -> DeviceMatrix:
    """Normal weights of about 1 / sqrt(columns), stored as the CPU stores them."""
    weight = torch.randn(n, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    if kind in TYPES:
        return DeviceMatrix(weight.to(TYPES[kind]).to(DEVICE), columns, kind)
    stored = torch.from_numpy(Matrix.of(weight, kind).rows.view("uint8"))
    return DeviceMatrix(stored.to(DEVICE), columns, kind)


def random_input(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    """f32 [tokens, columns] of standard normal values on the device."""
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest expected value; a failure shows the first mismatches."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    wrong = ((found - expected).abs() <= tolerance * expected.abs().max().clamp(min=1e-30)).logical_not().nonzero()
    shown = [(tuple(at.tolist()), float(found[tuple(at)]), float(expected[tuple(at)])) for at in wrong[:5]]
    assert not len(wrong), f"{len(wrong)} of {found.numel()} differ, first (index, found, expected): {shown}"


__all__ = ["DEVICE", "KINDS", "assert_close", "random_input", "random_matrix"]
