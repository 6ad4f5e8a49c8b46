"""What a dense pass over many tokens does between its GEMMs, in place or into given buffers: nothing is allocated.

    split     terms[0] = bf16(x), terms[1] = bf16(x - terms[0]), terms[2] = bf16(x - terms[0] - terms[1])
    widen     out[i, j] = weight[i, j] as f32
    activate  first = act(first) * second, or act(first); of dReLU relu(first) * relu(second)

The three terms of `split` add up to x, and the product of two bf16 values is exact in f32: so a GEMM of the terms with
bf16 weights on tensor cores, whose three results are added, is one of f32 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import SCALE_BYTES, activation_word
from gpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from gpu_kernels.constants import BLOCK_WEIGHTS, GROUP_WEIGHTS, INT4_OFFSET
from gpu_kernels.matrix import DeviceMatrix

TERMS = 3
_BLOCK = 1024
_WORDS = {"int8": torch.int8, "int4": torch.int16}  # what codes are loaded as


@triton.jit
def _split_kernel(x, terms, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    rest = tl.load(x + at, mask=mask, other=0.0)
    for i in tl.static_range(3):
        term = rest.to(tl.bfloat16)
        tl.store(terms + i * size + at, term, mask=mask)
        rest -= term.to(tl.float32)


def split(x: torch.Tensor, terms: torch.Tensor) -> None:
    """Write the three bf16 terms of x f32 [n, k] to `terms` [3, n, k]. Raises `ValueError` for a misfit."""
    fits = terms.shape == (TERMS, *x.shape) and x.dtype == torch.float32 and terms.dtype == torch.bfloat16
    if not fits or not x.is_contiguous() or not terms.is_contiguous():
        raise ValueError(
            f"split wants contiguous f32 [n, k] and bf16 [3, n, k], got {x.dtype} {tuple(x.shape)}, "
            f"{terms.dtype} {tuple(terms.shape)}"
        )
    _split_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, terms, x.numel(), BLOCK=_BLOCK)


def split_ref(x: torch.Tensor, terms: torch.Tensor) -> None:
    """`split` in torch."""
    rest = x.clone()
    for term in terms:
        term.copy_(rest)
        rest -= term.float()


@triton.jit
def _widen_kernel(rows, scales, out, columns, width, split_at, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """rows: codes in int8 or int16 words, `width` to a row; scales: f16, those of a row start at `split_at`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < columns
    if KIND == "int4":
        at = rows + row * width + c // GROUP_WEIGHTS * BLOCK_WEIGHTS + c % BLOCK_WEIGHTS
        words = tl.load(at, mask=mask, other=0).to(tl.int32)
        codes = ((words >> (c % GROUP_WEIGHTS // BLOCK_WEIGHTS * 4)) & 15) - INT4_OFFSET
        scale_width = width
    else:
        tl.static_assert(KIND == "int8", "unknown kind of rows in blocks")
        codes = tl.load(rows + row * width + c, mask=mask, other=0).to(tl.int32)
        scale_width = width // 2
    scale = tl.load(scales + row * scale_width + split_at + c // BLOCK_WEIGHTS, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * columns + c, codes.to(tl.float32) * scale, mask=mask)


def widen(matrix: DeviceMatrix, out: torch.Tensor) -> None:
    """Write all weights as f32 to `out`, contiguous [n, columns]. Raises `ValueError` for a misfit."""
    if out.shape != matrix.shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"widen wants contiguous f32 {matrix.shape}, got {out.dtype} {tuple(out.shape)}")
    if not matrix.layout.in_blocks:
        out.copy_(matrix.rows)
        return
    rows, scales = matrix.rows.view(_WORDS[matrix.kind]), matrix.rows.view(torch.float16)
    split_at = matrix.layout.codes_bytes(matrix.columns) // SCALE_BYTES
    grid = (matrix.shape[0], triton.cdiv(matrix.columns, _BLOCK))
    _widen_kernel[grid](
        rows, scales, out, matrix.columns, rows.shape[1], split_at, KIND=matrix.kind, BLOCK=_BLOCK
    )  # fmt: skip


def widen_ref(matrix: DeviceMatrix, out: torch.Tensor) -> None:
    """`widen` in torch."""
    out.copy_(matrix.widen())


@triton.jit
def _activate_kernel(first, second, size, WORD: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = activate(WORD, tl.load(first + at, mask=mask, other=0.0))
    if GATED:
        value *= activate_up(WORD, tl.load(second + at, mask=mask, other=0.0))
    tl.store(first + at, value, mask=mask)


def activate_product(first: torch.Tensor, second: torch.Tensor | None, activation: str) -> None:
    """first = act(first) * second in place, or act(first) without a second; contiguous f32 of one shape.

    Raises `ValueError` for a misfit.
    """
    for tensor in (first,) if second is None else (first, second):
        if tensor.shape != first.shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"activate_product wants contiguous f32 of one shape, got {tuple(tensor.shape)}")
    _activate_kernel[(triton.cdiv(first.numel(), _BLOCK),)](
        first, second, first.numel(), WORD=activation_word(activation), GATED=second is not None, BLOCK=_BLOCK
    )


def activate_product_ref(first: torch.Tensor, second: torch.Tensor | None, activation: str) -> None:
    """`activate_product` in torch."""
    value = activate_ref(activation, first.double())
    first.copy_(value if second is None else value * activate_up_ref(activation, second))
