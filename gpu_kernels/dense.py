"""What a dense pass over many tokens does between its GEMMs, in place or into given buffers: nothing is allocated.

    widen     out[i, j] = weight[i, j] as f32 or f16
    sum       out[t] (= or +=) scales[t] * (products[1, t] + products[0, t]) + bias
    hidden    terms and scale of act(gate[t]) * up[t], each such a sum; of dReLU relu(gate[t]) * relu(up[t])

A GEMM takes a token x as `row_gemm.split_rows` gives it: terms of the weights' type that add up to x / scale. Two
of bf16 leave out 2^-18 of a value at most, two of f16 2^-38 of a row's largest and 2^-22 of a value: no more than what
tensor cores cut off as they add up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import SCALE_BYTES, activation_word
from gpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from gpu_kernels.constants import BLOCK_WEIGHTS, GROUP_WEIGHTS, INT4_OFFSET
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.row_gemm import split_rows_ref, store_terms

_BLOCK = 1024
_WORDS = {"int8": torch.int8, "int4": torch.int16}  # what codes are loaded as


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
    tl.store(out + row * columns + c, (codes.to(tl.float32) * scale).to(out.dtype.element_ty), mask=mask)


def widen(matrix: DeviceMatrix, out: torch.Tensor) -> None:
    """Write all weights as f32 or f16 to `out`, contiguous [n, columns]. Raises `ValueError` for a misfit."""
    if out.shape != matrix.shape or out.dtype not in (torch.float32, torch.float16) or not out.is_contiguous():
        raise ValueError(f"widen wants contiguous f32 or f16 {matrix.shape}, got {out.dtype} {tuple(out.shape)}")
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
def _summed(products, at, mask, step, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of all terms, which lie `step` apart, the smallest first."""
    value = tl.load(products + (TERMS - 1) * step + at, mask=mask, other=0.0)
    for i in tl.static_range(TERMS - 2, -1, -1):
        value += tl.load(products + i * step + at, mask=mask, other=0.0)
    return value


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    products, scales, bias, out, n, step, out_stride, TERMS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    value = _summed(products, t * n + column, mask, step, TERMS) * tl.load(scales + t)
    if bias is not None:
        value += tl.load(bias + column, mask=mask, other=0.0)
    place = out + t * out_stride + column
    if ADD:
        value += tl.load(place, mask=mask, other=0.0)
    tl.store(place, value, mask=mask)


def sum_products(
    products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool
) -> None:
    """out = scales[t] * the sum of products[:, t] + bias, or out += it where `add`.

    products: contiguous f32 [terms, t, n], of the largest term first; scales: f32 [t]; bias: f32 [n] or None; out: f32
    [t, n], columns of wider rows perhaps. Raises `ValueError` for a misfit.
    """
    terms, tokens, n = _checked("sum_products", products, scales, bias)
    if out.shape != (tokens, n) or out.dtype != torch.float32 or out.stride(1) != 1:
        raise ValueError(f"sum_products wants f32 [{tokens}, {n}], got {out.dtype} {tuple(out.shape)}")
    _sum_kernel[(tokens, triton.cdiv(n, _BLOCK))](
        products, scales, bias, out, n, tokens * n, out.stride(0), TERMS=terms, ADD=add, BLOCK=_BLOCK
    )  # fmt: skip


def sum_products_ref(
    products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool
) -> None:
    """`sum_products` in torch, in f64."""
    value = _sum_ref(products, scales, bias)
    out.copy_(out + value if add else value)


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    gate, up, scales, gate_bias, up_bias, terms, hidden_scales, n, TERMS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """A token's."""
    t, tokens, column = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, BLOCK)
    mask, scale = column < n, tl.load(scales + t)
    at, step = t * n + column, tokens.to(tl.int64) * n
    value = _summed(up, at, mask, step, TERMS) * scale
    if up_bias is not None:
        value += tl.load(up_bias + column, mask=mask, other=0.0)
    if gate is None:
        value = activate(ACTIVATION, value)
    else:
        first = _summed(gate, at, mask, step, TERMS) * scale
        if gate_bias is not None:
            first += tl.load(gate_bias + column, mask=mask, other=0.0)
        value = activate(ACTIVATION, first) * activate_up(ACTIVATION, value)
    store_terms(tl.where(mask, value, 0.0), terms + at, step, hidden_scales + t, mask, TERMS)


def hidden_terms(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    scales: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    activation: str,
    terms: torch.Tensor,
    hidden_scales: torch.Tensor,
) -> None:
    """Write the hidden values of an FFN as `split_rows` would, from the products of gate, if there is one, and of up.

    gate, up: contiguous f32 [terms, t, n] and scales f32 [t] as of `sum_products`; biases: of gate and up, f32 [n] or
    None; terms: contiguous [terms, t, n] of 16-bit values or f32; hidden_scales: f32 [t]. Raises `ValueError` for a
    misfit.
    """
    count, tokens, n = _checked("hidden_terms", up, scales, biases[1])
    if gate is not None:
        _checked("hidden_terms", gate, scales, biases[0])
    fits = terms.shape == up.shape and terms.is_contiguous() and (gate is None or gate.shape == up.shape)
    if not fits or hidden_scales.shape != (tokens,):
        raise ValueError(f"hidden_terms wants terms {tuple(up.shape)}, got {tuple(terms.shape)}")
    block = triton.next_power_of_2(n)
    _hidden_kernel[(tokens,)](
        gate, up, scales, *biases, terms, hidden_scales, n, TERMS=count, ACTIVATION=activation_word(activation),
        BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip


def hidden_terms_ref(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    scales: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    activation: str,
    terms: torch.Tensor,
    hidden_scales: torch.Tensor,
) -> None:
    """`hidden_terms` in torch, in f64."""
    value = _sum_ref(up, scales, biases[1])
    if gate is None:
        value = activate_ref(activation, value)
    else:
        value = activate_ref(activation, _sum_ref(gate, scales, biases[0])) * activate_up_ref(activation, value)
    split_rows_ref(value.float(), terms, hidden_scales)


def _sum_ref(products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    value = products.double().sum(0) * scales[:, None]
    return value if bias is None else value + bias


def _checked(
    name: str, products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, int, int]:
    """The shape of products."""
    fits = products.ndim == 3 and products.dtype == torch.float32 and products.is_contiguous()
    fits = fits and scales.shape == products.shape[1:2] and (bias is None or bias.shape == products.shape[2:])
    if not fits:
        raise ValueError(
            f"{name} wants contiguous f32 products [terms, t, n], scales [t] and biases [n], got {products.dtype} "
            f"{tuple(products.shape)}, {tuple(scales.shape)}, {None if bias is None else tuple(bias.shape)}"
        )
    return products.shape[0], products.shape[1], products.shape[2]
