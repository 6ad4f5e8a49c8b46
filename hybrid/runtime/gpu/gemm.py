"""`GpuGemm`: products of many f32 tokens with stored weights on the GPU, and an FFN of them.

              fast                                                precise
    bf16      tokens as two bf16 terms                            as three
    f16       tokens as two f16 terms                             the same
    int8, 4   weights widened to f16, tokens as two f16 terms     weights widened to f32
    f32       as they are                                         the same

Terms go through tensor cores at once; products of two 16-bit values are exact in f32, in which they are summed. Two
bf16 terms keep 18 bits of a token, and f16 11 bits of a weight in blocks. Everything happens in one scratch buffer. f32
GEMMs must not use TF32, which is torch's default.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpu_kernels.dense import hidden_terms, sum_products, widen
from gpu_kernels.matrix import KINDS, DeviceMatrix
from gpu_kernels.row_gemm import split_rows
from gpu_kernels.sparse_ffn import DeviceFFNView
from placement.workspace import GemmSizes

_ALIGNED = 64  # columns and rows of a piece are a multiple of this, or all there are


class _Terms(NamedTuple):
    """Tokens as products take them: values [terms, t, k] add up to the tokens, each divided by its scale [t]."""

    values: torch.Tensor
    scales: torch.Tensor


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
    """Products through `scratch`, f32 of `sum(sizes.parts)` elements, whose content each call destroys."""

    def __init__(self, scratch: torch.Tensor, sizes: GemmSizes, precise: bool) -> None:
        self._precise, self._room = precise, 4 * sizes.columns  # columns of products, of all terms together
        scales, self._tokens, self._hidden, self._sums, self._wide = scratch.split(sizes.parts)
        self._scales = scales[: sizes.tokens], scales[sizes.tokens : 2 * sizes.tokens]

    def project(
        self, x: torch.Tensor, weight: DeviceMatrix, bias: torch.Tensor | None, out: torch.Tensor, add: bool = False
    ) -> None:
        """out = x W^T + b, or out += it: x f32 [t, k], weight [m, k], bias f32 [m] or None, out f32 [t, m]."""
        terms = self._split(x, weight.kind)
        for rows in pieces(weight.shape[0], self._most_rows(weight)):
            products = self._products(terms, self._weights(some_rows(weight, rows)).T)
            sum_products(products, terms.scales, None if bias is None else bias[rows], out[:, rows], add)

    def add_ffn(self, x: torch.Tensor, ffn: DeviceFFNView, out: torch.Tensor) -> None:
        """out += all neurons of `ffn` for x, without the bias of down: x and out f32 [t, d]."""
        terms = self._split(x, ffn.up.kind)
        for some in pieces(ffn.up.shape[0], self._most_rows(ffn.up, 2)):
            up = self._products(terms, self._weights(some_rows(ffn.up, some)).T)
            gate = None
            if ffn.gate is not None:
                gate = self._products(terms, self._weights(some_rows(ffn.gate, some)).T, up.numel())
            biases = [None if bias is None else bias[some] for bias in (ffn.gate_bias, ffn.up_bias)]
            hidden = self._terms(self._hidden, 1, up.shape, ffn.up.kind)
            hidden_terms(gate, up, terms.scales, (biases[0], biases[1]), ffn.activation, *hidden)
            down = self._weights(some_rows(ffn.down, some))
            for columns in pieces(down.shape[1], self._room // max(2, len(hidden.values))):
                products = self._products(hidden, down[:, columns])
                sum_products(products, hidden.scales, None, out[:, columns], add=True)

    def _most_rows(self, weight: DeviceMatrix, matrices: int = 1) -> int:
        """Rows of a matrix at once, or of two together: what there is room for, as products and as widened weights."""
        most = max(1, self._room // (matrices * max(2, self._count(weight.kind))))
        if not weight.layout.in_blocks:
            return most
        return min(most, self._wide.view(self._type(weight.kind)).numel() // weight.columns)

    def _count(self, kind: str) -> int:
        """Terms of a token beside weights of a kind."""
        return 1 if self._type(kind) == torch.float32 else 3 if kind == "bf16" and self._precise else 2

    def _type(self, kind: str) -> torch.dtype:
        """What weights of a kind, and tokens with them, are multiplied as."""
        packed = torch.float32 if self._precise else torch.float16
        return packed if kind in ("int8", "int4") else KINDS[kind]

    def _split(self, x: torch.Tensor, kind: str) -> _Terms:
        terms = self._terms(self._tokens, 0, (self._count(kind), *x.shape), kind)
        split_rows(x, *terms)
        return terms

    def _terms(self, room: torch.Tensor, place: int, shape: tuple[int, ...], kind: str) -> _Terms:
        values = room.view(self._type(kind))[: shape[0] * shape[1] * shape[2]].view(shape)
        return _Terms(values, self._scales[place][: shape[1]])

    def _weights(self, matrix: DeviceMatrix) -> torch.Tensor:
        """All weights of a matrix, as they are multiplied."""
        if not matrix.layout.in_blocks:
            return matrix.rows
        wide = self._wide.view(self._type(matrix.kind))[: matrix.shape[0] * matrix.columns].view(matrix.shape)
        widen(matrix, wide)
        return wide

    def _products(self, terms: _Terms, weight: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Each term times weight [k, m], f32 [terms, t, m] from element `at` of the room on."""
        count, tokens, _ = terms.values.shape
        left, columns = terms.values.flatten(0, 1), weight.shape[1]
        out = self._sums[at : at + len(left) * columns].view(-1, columns)
        if not left.is_cuda:
            torch.mm(left.float(), weight.float(), out=out)
        elif left.dtype == torch.float32:
            torch.mm(left, weight, out=out)
        else:
            torch.mm(left, weight, out_dtype=torch.float32, out=out)
        return out.view(count, tokens, columns)
