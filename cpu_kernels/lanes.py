"""Loads of bf16, f16, f32 and int8 weights as f32, and the view of a tensor under which kernels see them.

NumPy has no bf16 and Numba's CPU target no half arithmetic, so kernels take 16-bit weights as integers and tell them
apart by signedness: bf16 as uint16, f16 as int16. int8 is a whole number that the kernel scales row by row. Both 16-bit
types widen with shifts and one multiply, so the same source
vectorises on any CPU, with or without F16C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Sums may be reordered into vector lanes and multiplies fused; infinities and NaN keep their meaning.
FAST_SUMS = {"reassoc", "contract", "nsz", "arcp"}

_I32, _F32 = ir.IntType(32), ir.FloatType()
# An f16 moved into an f32's bit positions has its exponent 112 too low; this product also handles subnormals.
_F16_TO_F32_SCALE = 2.0**112


def kernel_view(weight: torch.Tensor) -> np.ndarray:
    """A C-contiguous NumPy view of a CPU tensor for the kernels: f32 and int8 as themselves, bf16 as
    uint16, f16 as int16.

    Raises `TypeError` for other types and `ValueError` for a tensor that is not contiguous.
    """
    if not weight.is_contiguous():
        raise ValueError(f"kernel weights must be contiguous, got strides {weight.stride()} for {tuple(weight.shape)}")
    if weight.dtype in (torch.float32, torch.int8):
        return weight.numpy()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16)
    if weight.dtype == torch.float16:
        return weight.view(torch.int16).numpy()
    raise TypeError(f"kernel weights are bf16, f16, f32 or int8, got {weight.dtype}")


def widen_ref(weight: np.ndarray) -> np.ndarray:
    """The f32 values of a `kernel_view`, in NumPy."""
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.view(np.float16).astype(np.float32) if weight.dtype == np.int16 else weight.astype(np.float32)


@intrinsic
def widen(typing_context: Any, value: Any) -> Any:
    """One stored weight as f32, by its type: float32 as is, uint16 as bf16, int16 as f16 (finite values), int8."""
    if value not in (types.float32, types.uint16, types.int16, types.int8):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (bits,) = args
        if value == types.float32:
            return bits
        if value == types.int8:
            return builder.sitofp(bits, _F32)
        if value == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16)), _F32)
        wide = builder.sext(bits, _I32)
        magnitude = builder.shl(builder.and_(wide, ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 13))
        scaled = builder.fmul(builder.bitcast(magnitude, _F32), ir.Constant(_F32, _F16_TO_F32_SCALE))
        sign = builder.and_(wide, ir.Constant(_I32, -0x80000000))
        return builder.bitcast(builder.or_(builder.bitcast(scaled, _I32), sign), _F32)

    return types.float32(value), generate
