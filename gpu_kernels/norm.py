"""Residual sum and RMSNorm or LayerNorm of each token, f32.

    x[t] += parts[0, t] + parts[1, t] + ...                                       in this order, when there are parts
    out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight                             RMSNorm, arXiv 1910.07467
    out[t] = (x[t] - mean(x[t])) / sqrt(var(x[t]) + eps) * weight + bias          LayerNorm, when there is a bias

or as it is, where there is no weight. A token is one program's, which keeps its whole row in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gpu_kernels.launch import begin, options

MOST_COLUMNS = 16384
# Kinds of norm, as kernels take them.
RMS, LAYER, AS_IS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def norm_kind(weight: torch.Tensor | None, bias: torch.Tensor | None) -> int:
    """What a norm with these vectors is, for `norm_weights` and `normed`."""
    return (AS_IS if weight is None else RMS if bias is None else LAYER).value


@triton.jit
def norm_weights(weight_ptr, bias_ptr, columns, mask, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A norm's weight and bias in registers, for `normed`: no kernel writes them, so they are read before the wait."""
    weight = tl.zeros(columns.shape, tl.float32)
    bias = weight
    if NORM != AS_IS:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if NORM == LAYER:
        bias = tl.load(bias_ptr + columns, mask=mask, other=0.0)
    return weight, bias


@triton.jit
def add_parts(values, parts_ptr, columns, mask, stride, PARTS: tl.constexpr, AT_ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """values + parts[0] + parts[1] + ..., in this order; the loads of AT_ONCE parts go out together."""
    for s in tl.range(0, PARTS, loop_unroll_factor=AT_ONCE):
        values += tl.load(parts_ptr + s * stride + columns, mask=mask, other=0.0)
    return values


@triton.jit
def normed(values, mask, weight, bias, eps, d, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The norm of the kind NORM of one row of d f32 values in registers.

    values, mask: [BLOCK >= d], mask where there is a column; what values hold elsewhere is ignored, and what is
    returned there is not to be stored. weight, bias: of `norm_weights`.
    """
    if NORM != AS_IS:
        values = tl.where(mask, values, 0.0)
        if NORM == LAYER:
            values = tl.where(mask, values - tl.sum(values, axis=0) / d, 0.0)
        values *= 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / d + eps)
        values = values * weight + bias if NORM == LAYER else values * weight
    return values


@triton.jit
def _residual_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    parts_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    d,
    stride,
    part_stride,
    PARTS: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * stride
    columns = tl.arange(0, BLOCK)
    mask = columns < d
    weight, bias = norm_weights(weight_ptr, bias_ptr, columns, mask, NORM)
    begin(PDL)
    values = tl.load(x_ptr + row + columns, mask=mask, other=0.0)
    if PARTS:
        values = add_parts(values, parts_ptr + row, columns, mask, part_stride, PARTS, AT_ONCE)
        tl.store(x_ptr + row + columns, values, mask=mask)
    if OUT:
        out = normed(values, mask, weight, bias, eps, d, NORM)
        tl.store(out_ptr + row + columns, out, mask=mask)


def row_sizes(d: int, most_warps: int = 16, sums: bool = False) -> dict[str, Any]:
    """Constants and options of a kernel in which one program holds a row of `d` values, and a norm's weights.

    A program that `sums` parts loads as many at once as its registers hold: where they do not, the compiler spills to
    local memory, which the GPU sets aside for every thread that it can run. Of 5120 values that took 0.8 GiB.
    """
    block = triton.next_power_of_2(d)
    warps = min(most_warps, max(1, block // 256))
    warps = max(warps, block // 1024)
    each, registers = max(1, block // (32 * warps)), min(255, 65536 // (32 * warps))
    fit = max(1, min(8, (registers - 30) // each - 2))
    at_once = {"AT_ONCE": 1 << fit.bit_length() - 1} if sums else {}
    return {"BLOCK": block, **at_once, **options(warps)}


def residual_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    parts: torch.Tensor | None = None,
) -> None:
    """Add `parts` to the residual `x` in place, and write its norm to `out`: LayerNorm if there is a bias.

    x, out: [t, d] f32, out None for the sum only; out may be x, which then holds the norm, and may then be columns of
    wider rows. parts: [s, t, d] f32 or None. weight, bias: [d] f32, or None for no norm. d: at most 16384. Raises
    `ValueError` when shapes, types or strides do not fit.
    """
    _check(x, weight, bias, out, parts)
    tokens, d = x.shape
    _residual_norm_kernel[(tokens,)](
        x,
        parts,
        weight,
        bias,
        out,
        float(eps),
        d,
        x.stride(0),
        tokens * d,
        PARTS=0 if parts is None else parts.shape[0],
        OUT=out is not None,
        NORM=norm_kind(weight, bias),
        **row_sizes(d, sums=True),
    )


def residual_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    parts: torch.Tensor | None = None,
) -> None:
    """`residual_norm` in torch: the sum in f32, as the kernel adds, the norm in f64."""
    for part in () if parts is None else parts:
        x += part
    if out is None:
        return
    if weight is None:
        out.copy_(x)
        return
    wide = x.double()
    if bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    out.copy_(wide if bias is None else wide + bias)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    parts: torch.Tensor | None,
) -> None:
    given = {"x": x, "weight": weight, "bias": bias, "out": out, "parts": parts}
    for name, array in given.items():
        in_place = array is not None and parts is None and out is x and array is x and x.stride(-1) == 1
        if array is not None and (array.dtype != torch.float32 or not (in_place or array.is_contiguous())):
            raise ValueError(
                f"residual_norm wants contiguous f32 tensors, got {name} {array.dtype} with strides {array.stride()}"
            )
    fits = x.ndim == 2 and 1 <= x.shape[1] <= MOST_COLUMNS and (out is None or out.shape == x.shape)
    fits = fits and all(p is None or p.shape == x.shape[1:] for p in (weight, bias))
    fits = fits and (parts is None or (parts.ndim == 3 and parts.shape[1:] == x.shape))
    if not fits or (out is None and parts is None) or (weight is None and bias is not None):
        shapes = ", ".join(f"{name} {None if a is None else tuple(a.shape)}" for name, a in given.items())
        raise ValueError(f"residual_norm arguments do not fit: {shapes}; at most {MOST_COLUMNS} columns")
