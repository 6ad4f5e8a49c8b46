"""Loads of bf16, f16, f32 and int8 weights as f32, and the view of a tensor under which kernels see them.

NumPy has no bf16 and Numba's CPU target no half arithmetic, so kernels take 16-bit weights as integers and tell them
apart by signedness: bf16 as uint16, f16 as int16. int8 is a whole number that the kernel scales row by row. Both 16-bit
types widen with shifts and one multiply, so the same source vectorises on any CPU, with or without F16C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be reordered into vector lanes and multiplies fused; infinities and NaN keep their meaning.
FAST_SUMS = {"reassoc", "contract", "nsz", "arcp"}

BLOCK = 64  # elements of one step of `dot`: 4 sums of 16 lanes hide the latency of additions
_LANES = 16
_STORED = (types.float32, types.uint16, types.int16, types.int8)
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
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


def _widen(builder: Any, value: Any, stored: Any, lanes: int | None) -> Any:
    """LLVM code that turns stored weights, one or a vector of `lanes`, into f32."""

    def of(kind: Any) -> Any:
        return kind if lanes is None else ir.VectorType(kind, lanes)

    def constant(kind: Any, number: float) -> Any:
        return ir.Constant(of(kind), number if lanes is None else [number] * lanes)

    if stored == types.float32:
        return value
    if stored == types.int8:
        return builder.sitofp(value, of(_F32))
    if stored == types.uint16:
        bits = builder.shl(builder.zext(value, of(_I32)), constant(_I32, 16))
        return builder.bitcast(bits, of(_F32))
    wide = builder.sext(value, of(_I32))
    magnitude = builder.shl(builder.and_(wide, constant(_I32, 0x7FFF)), constant(_I32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, of(_F32)), constant(_F32, _F16_TO_F32_SCALE))
    sign = builder.and_(wide, constant(_I32, -0x80000000))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, of(_I32)), sign), of(_F32))


@intrinsic
def widen(typing_context: Any, value: Any) -> Any:
    """One stored weight as f32, by its type: float32 as is, uint16 as bf16, int16 as f16 (finite values), int8."""
    if value not in _STORED:
        return None
    return types.float32(value), lambda context, builder, signature, args: _widen(builder, args[0], value, None)


@intrinsic
def _dot_blocks(typing_context: Any, row: Any, x: Any, ahead: Any) -> Any:
    """row . x over the leading whole blocks of `BLOCK` elements, while lines of `ahead` are fetched into L2."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_at, x_at, ahead_at = (
            context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, args, strict=True)
        )
        vector = ir.VectorType(_F32, _LANES)
        stored = ir.VectorType(context.get_data_type(row.dtype), _LANES)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * _LANES)) for _ in range(BLOCK // _LANES)]
        (length,) = cgutils.unpack_tuple(builder, row_at.shape)
        end = builder.and_(length, ir.Constant(_I64, -BLOCK))
        with cgutils.for_range_slice(builder, _I64(0), end, _I64(BLOCK), intp=_I64) as (start, _):
            for line in range(0, BLOCK, 64 // (row.dtype.bitwidth // 8)):
                _prefetch(builder, builder.gep(ahead_at.data, [builder.add(start, _I64(line))]))
            for number, total in enumerate(sums):
                at = [builder.add(start, _I64(number * _LANES))]
                weights = _load(builder, builder.gep(row_at.data, at), stored, row.dtype.bitwidth // 8)
                inputs = _load(builder, builder.gep(x_at.data, at), vector, 4)
                # Not the fma intrinsic: without such an instruction that would be a library call per element.
                product = builder.fmul(_widen(builder, weights, row.dtype, _LANES), inputs, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        return _add_up(builder, [builder.load(total) for total in sums])

    fits = all(isinstance(kind, types.Array) and kind.ndim == 1 and kind.layout == "C" for kind in (row, x, ahead))
    if not fits or row.dtype not in _STORED or ahead.dtype != row.dtype or x.dtype != types.float32:
        return None
    return types.float32(row, x, ahead), generate


@njit(fastmath=FAST_SUMS, nogil=True, inline="always")
def dot(row, x, ahead):  # type: ignore[no-untyped-def]
    """row . x, row widened to f32, in a fixed order; `ahead` is the row that will be read next.

    A row of a list is a jump that no hardware prefetcher foresees: 10 GB/s by one core; with the next row of 8 KB
    fetched meanwhile, 20 GB/s.
    """
    total = _dot_blocks(row, x, ahead)
    for j in range(x.shape[0] & -BLOCK, x.shape[0]):
        total += widen(row[j]) * x[j]
    return total


@intrinsic
def fetch(typing_context: Any, row: Any, at: Any) -> Any:
    """Fetch the cache line of row[at] into L2."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(row)(context, builder, args[0])
        _prefetch(builder, builder.gep(array.data, [args[1]]))
        return context.get_dummy_value()

    return types.void(row, types.intp), generate


@njit(fastmath=FAST_SUMS, nogil=True, inline="always")
def add_scaled(row, scale, out, ahead):  # type: ignore[no-untyped-def]
    """out += scale * row, row widened to f32; `ahead` is the row that will be read next."""
    for j in range(0, row.shape[0], 64 // row.itemsize):
        fetch(ahead, j)
    for j in range(out.shape[0]):
        out[j] += widen(row[j]) * scale


def _prefetch(builder: Any, pointer: Any) -> None:
    """Fetch a cache line into L2, for reading."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    read, keep_in_l2, data = _I32(0), _I32(2), _I32(1)
    builder.call(function, [builder.bitcast(pointer, byte), read, keep_in_l2, data])


def _load(builder: Any, pointer: Any, vector: Any, align: int) -> Any:
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = align
    return loaded


def _add_up(builder: Any, sums: list[Any]) -> Any:
    """All lanes of all vectors: pairs of vectors, then halves, so that the order is one for every CPU."""
    while len(sums) > 1:
        sums = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    (total,), width = sums, _LANES
    while width > 1:
        width //= 2
        undefined = ir.Constant(total.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                total, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(at, at + width)))
            )
            for at in (0, width)
        )
        total = builder.fadd(low, high)
    return builder.extract_element(total, _I32(0))
