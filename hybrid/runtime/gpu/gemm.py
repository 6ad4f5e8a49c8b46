"""`GpuGemm`: products of many f32 tokens with stored weights on the GPU, as exact as f32 arithmetic.

bf16 weights: x is split into three bf16 terms that add up to it, which go through tensor cores at once; products of
bf16 values are exact in f32, in which they are summed. All others: some rows at a time are widened to f32. Everything
happens in one scratch buffer. f32 GEMMs must not use TF32, which is torch's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gpu_kernels.dense import TERMS, split, widen
from gpu_kernels.matrix import DeviceMatrix

_ALIGNED = 64  # columns and rows of a piece are a multiple of this, or all there are
_LEAST_COLUMNS = 1024  # of a piece of a product of bf16 weights, where the matrix has so many


class Projection(NamedTuple):
    """out = x W^T + b: weight [m, k]; bias [m] f32 or None; out f32 [t, m], rows contiguous."""

    weight: DeviceMatrix
    bias: torch.Tensor | None
    out: torch.Tensor


def scratch_floats(tokens: int, widest: int, rows: int) -> int:
    """f32 elements of scratch for up to `tokens` tokens and matrices of up to `widest` columns or rows.

    rows: that can be widened at a time.
    """
    terms = -(-TERMS * tokens * widest // 2) + _ALIGNED
    return max(rows * widest, terms + TERMS * tokens * min(widest, _LEAST_COLUMNS))


def pieces(count: int, most: int) -> list[slice]:
    """0 to `count` in slices of at most `most`, all about as large."""
    if count <= most:
        return [slice(0, count)] if count else []
    step = -(-count // -(-count // most))
    if most >= _ALIGNED:
        step = min(-(-step // _ALIGNED) * _ALIGNED, most // _ALIGNED * _ALIGNED)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def some_rows(matrix: DeviceMatrix, rows: slice) -> DeviceMatrix:
    """A view of some rows."""
    return DeviceMatrix(matrix.rows[rows], matrix.columns, matrix.kind)


class GpuGemm:
    """Products through `scratch`, f32 of at least `scratch_floats` elements, whose content each call destroys."""

    def __init__(self, scratch: torch.Tensor) -> None:
        self._scratch = scratch

    def project(self, x: torch.Tensor, *projections: Projection) -> None:
        """x W^T + b for x contiguous f32 [t, k]. The weights are of one kind."""
        if projections[0].weight.kind == "bf16":
            terms, products = self._split(x)
        for weight, bias, out in projections:
            if weight.kind == "bf16":
                for rows in pieces(weight.shape[0], products.numel() // terms.shape[0]):
                    _set_sum(_multiply(terms, weight.rows[rows].T, products), out[:, rows])
            else:
                for rows in self._rows(weight):
                    torch.mm(x, self._widened(weight, rows).T, out=out[:, rows])
            if bias is not None:
                out += bias

    def add_product(self, x: torch.Tensor, weight: DeviceMatrix, out: torch.Tensor) -> None:
        """out += x W for x contiguous f32 [t, k], W [k, m] and out f32 [t, m]."""
        if weight.kind != "bf16":
            for rows in self._rows(weight):
                out.addmm_(x[:, rows], self._widened(weight, rows))
            return
        terms, products = self._split(x)
        for columns in pieces(weight.columns, products.numel() // terms.shape[0]):
            for part in reversed(_multiply(terms, weight.rows[:, columns], products)):
                out[:, columns] += part

    def _rows(self, weight: DeviceMatrix) -> Sequence[slice]:
        """Which rows to widen at a time: those of f32 are used as they are."""
        most = weight.shape[0] if weight.kind == "f32" else self._scratch.numel() // weight.columns
        return pieces(weight.shape[0], most)

    def _widened(self, weight: DeviceMatrix, rows: slice) -> torch.Tensor:
        chosen = some_rows(weight, rows)
        if chosen.kind == "f32":
            return chosen.rows
        wide = self._scratch[: chosen.shape[0] * chosen.columns].view(chosen.shape)
        widen(chosen, wide)
        return wide

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The terms of x, [3 t, k] bf16, and what is left of the scratch, f32."""
        tokens, width = x.shape
        size = -(-TERMS * tokens * width // (2 * _ALIGNED)) * _ALIGNED
        terms = self._scratch[:size].view(torch.bfloat16)[: TERMS * tokens * width].view(TERMS, tokens, width)
        split(x, terms)
        return terms.view(-1, width), self._scratch[size:]


def _multiply(terms: torch.Tensor, weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """terms [3 t, k] times weight [k, m], both bf16, in f32: a product for each term [3, t, m], in `products`."""
    out = products[: terms.shape[0] * weight.shape[1]].view(-1, weight.shape[1])
    if terms.is_cuda:
        torch.mm(terms, weight, out_dtype=torch.float32, out=out)
    else:
        torch.mm(terms.float(), weight.float(), out=out)
    return out.view(TERMS, -1, weight.shape[1])


def _set_sum(parts: torch.Tensor, out: torch.Tensor) -> None:
    """The sum of three products, smallest first."""
    torch.add(parts[2], parts[1], out=out)
    out += parts[0]
