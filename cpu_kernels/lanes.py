"""Vector code for rows of weights: dot products, sums of scaled rows, and the view under which kernels see a tensor.

A row is an address, as the decode step finds it in a table of addresses; `like` is any array whose type says how rows
are stored (`row_types.py`).

bf16, f16 and f32 rows are multiplied with the input in f32. Rows in blocks are multiplied in integers with an input of
16 bits, one f32 scale a block (`Input`), by the instruction that multiplies pairs of 16-bit lanes and adds them
(pmaddwd), which every x86-64 has: an input rounded to 1 part in 65,534 of its block's largest element changes nothing
that is seen in the answer, one of 8 bits would. Sums have one order on every CPU; only fused products round otherwise.

While rows are read, those that come next are fetched into L2. A row of a list is a jump that no hardware prefetcher
foresees: 10 GB/s by one core; with the next row of 8 KB fetched meanwhile, 20 GB/s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.compiled import target_features
from cpu_kernels.contract import GROUP

# Sums may be reordered into vector lanes and multiplies fused; infinities and NaN keep their meaning.
FAST_SUMS = {"reassoc", "contract", "nsz", "arcp"}

LANES = 16
FLOATS = (types.float32, types.uint16, types.int16)
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
# An f16 moved into an f32's bit positions has its exponent 112 too low; this product also handles subnormals.
_F16_TO_F32_SCALE = 2.0**112
_LARGEST_F16 = 65504.0


def kernel_view(weight: torch.Tensor) -> np.ndarray:
    """A C-contiguous NumPy view of a CPU tensor for the kernels: f32 and int8 as themselves, bf16 as
    uint16, f16 as int16.

    Raises `TypeError` for other types and `ValueError` for a tensor that is not contiguous.
    """
    if not weight.is_contiguous():
        raise ValueError(f"kernel weights must be contiguous, got strides {weight.stride()} for {tuple(weight.shape)}")
    if weight.dtype in (torch.float32, torch.float16, torch.int8):
        return stored_view(weight.numpy())
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16)
    raise TypeError(f"kernel weights are bf16, f16, f32 or int8, got {weight.dtype}")


def stored_view(values: np.ndarray) -> np.ndarray:
    """f16 as the int16 that kernels know it by, other types as they are."""
    return values.view(np.int16) if values.dtype == np.float16 else values


def widen_ref(weight: np.ndarray) -> np.ndarray:
    """The f32 values of a `kernel_view` of floats, in NumPy. Raises `TypeError` for other arrays."""
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    if weight.dtype == np.int16:
        return weight.view(np.float16).astype(np.float32)
    if weight.dtype == np.float32:
        return weight.astype(np.float32)
    raise TypeError(f"floats are arrays of uint16 (bf16), int16 (f16) or float32, got {weight.dtype}")


def constant(kind: Any, number: float, lanes: int) -> Any:
    """A vector of `lanes` times the same number."""
    return ir.Constant(ir.VectorType(kind, lanes), [number] * lanes)


def _widen(builder: Any, value: Any, stored: Any, lanes: int | None, has_f16c: bool = False) -> Any:
    """LLVM code that turns stored bf16, f16 or f32 weights, one or a vector of `lanes`, into f32."""

    def of(kind: Any) -> Any:
        return kind if lanes is None else ir.VectorType(kind, lanes)

    def each(kind: Any, number: float) -> Any:
        return ir.Constant(of(kind), number if lanes is None else [number] * lanes)

    if stored not in FLOATS:
        raise TypeError(f"weights stored as {stored} are not floats")
    if stored == types.float32:
        return value
    if stored == types.uint16:
        bits = builder.shl(builder.zext(value, of(I32)), each(I32, 16))
        return builder.bitcast(bits, of(F32))
    if has_f16c:
        return builder.fpext(builder.bitcast(value, of(ir.HalfType())), of(F32))
    wide = builder.sext(value, of(I32))
    magnitude = builder.shl(builder.and_(wide, each(I32, 0x7FFF)), each(I32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, of(F32)), each(F32, _F16_TO_F32_SCALE))
    sign = builder.and_(wide, each(I32, -0x80000000))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, of(I32)), sign), of(F32))


def _as_f16(builder: Any, value: Any, has_f16c: bool) -> Any:
    """LLVM code for the bits of the f16 nearest to an f32, halves to even."""
    top = F32(_LARGEST_F16)
    for edge, order in ((top, ">"), (F32(-_LARGEST_F16), "<")):
        value = builder.select(builder.fcmp_ordered(order, value, edge), edge, value)
    if has_f16c:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), I16)
    bits = builder.bitcast(value, I32)
    magnitude = builder.and_(bits, I32(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, I32(13)), I32(1))
    normal = builder.lshr(builder.add(builder.add(magnitude, I32(0xFFF - (112 << 23))), odd), I32(13))
    # Beside 0.5 an f32 has the steps of f16's smallest numbers; the sum rounds to them.
    half = builder.fadd(builder.bitcast(magnitude, F32), F32(0.5))
    small = builder.sub(builder.bitcast(half, I32), I32(126 << 23))
    found = builder.select(builder.icmp_unsigned("<", magnitude, I32(113 << 23)), small, normal)
    found = builder.select(builder.fcmp_unordered("uno", value, value), I32(0x7E00), found)
    sign = builder.and_(builder.lshr(bits, I32(16)), I32(0x8000))
    return builder.trunc(builder.or_(found, sign), I16)


class Code:
    """One intrinsic's LLVM code in the making: loads and sums over row addresses."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder
        self.features = target_features(context)

    def data(self, kind: Any, value: Any) -> Any:
        """Address of an array's first element."""
        return self.builder.ptrtoint(self.context.make_array(kind)(self.context, self.builder, value).data, I64)

    def load(self, address: Any, element: Any, lanes: int, offset: Any = 0, align: int = 1) -> Any:
        """A vector at `address` + `offset` bytes."""
        at = self.builder.add(address, I64(offset) if isinstance(offset, int) else offset)
        loaded = self.builder.load(self.builder.inttoptr(at, ir.VectorType(element, lanes).as_pointer()))
        loaded.align = align
        return loaded

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=align)

    def widened(self, address: Any, dtype: Any, lanes: int, offset: Any = 0) -> Any:
        """f32 of the stored bf16, f16 or f32 weights at `address`."""
        size = dtype.bitwidth // 8
        loaded = self.load(address, self.context.get_data_type(dtype), lanes, offset, size)
        return _widen(self.builder, loaded, dtype, lanes, "f16c" in self.features)

    def fetch(self, address: Any) -> None:
        """Fetch the cache line of `address` into L2, for reading."""
        byte = I8.as_pointer()
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0"
        )
        read, keep_in_l2, data = I32(0), I32(2), I32(1)
        self.builder.call(function, [self.builder.inttoptr(address, byte), read, keep_in_l2, data])

    def fetch_lines(self, addresses: list[Any], offset: Any, size: int) -> None:
        """Fetch the lines of `size` bytes at `offset` from each of `addresses`."""
        for address in addresses:
            at = self.builder.add(address, offset)
            for line in range(0, size, 64):
                self.fetch(self.builder.add(at, I64(line)))

    def fused(self, a: Any, b: Any, total: Any) -> Any:
        """a * b + total; not the fma intrinsic, which without such an instruction is a library call per element."""
        return self.builder.fadd(total, self.builder.fmul(a, b, flags=("contract",)), flags=("contract",))

    def pair_products(self, a: Any, b: Any) -> Any:
        """i32 [16] of i16 [32] a and b: a[2l] b[2l] + a[2l + 1] b[2l + 1], by the widest pmaddwd there is."""
        if "avx512bw" in self.features:
            width, name = 32, "llvm.x86.avx512.pmaddw.d.512"
        elif "avx2" in self.features:
            width, name = 16, "llvm.x86.avx2.pmadd.wd"
        elif "sse2" in self.features:
            width, name = 8, "llvm.x86.sse2.pmadd.wd"
        else:
            return self._plain_pair_products(a, b)
        part, half = ir.VectorType(I16, width), ir.VectorType(I32, width // 2)
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(half, [part, part]), name)
        parts = [
            self.builder.call(function, [self.slice(a, at, width), self.slice(b, at, width)])
            for at in range(0, 32, width)
        ]
        while len(parts) > 1:
            count = 2 * parts[0].type.count
            parts = [
                self.picked(low, high, list(range(count))) for low, high in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    def _plain_pair_products(self, a: Any, b: Any) -> Any:
        wide = ir.VectorType(I32, 32)
        product = self.builder.mul(self.builder.sext(a, wide), self.builder.sext(b, wide))
        even, odd = (self.picked(product, product, list(range(first, 32, 2))) for first in (0, 1))
        return self.builder.add(even, odd)

    def slice(self, vector: Any, start: int, lanes: int) -> Any:
        """Lanes [start, start + lanes) of `vector`."""
        return vector if lanes == vector.type.count else self.picked(vector, vector, list(range(start, start + lanes)))

    def splat(self, value: Any, lanes: int) -> Any:
        """A vector of `lanes` times the same value."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        one = self.builder.insert_element(undefined, value, I32(0))
        return self.picked(one, undefined, [0] * lanes)

    def lane(self, vector: Any, number: int, lanes: int = LANES) -> Any:
        """One lane of `vector` in all of `lanes`."""
        return self.picked(vector, vector, [number] * lanes)

    def picked(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of `a` and `b`, which are numbered one after the other."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def transposed(self, rows: list[Any]) -> list[Any]:
        """Vector c holds lane c of each of the 16 vectors `rows`."""
        for step in (1, 2, 4, 8):
            low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
            high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
            rows = [self.picked(rows[n & ~step], rows[n | step], high if n & step else low) for n in range(len(rows))]
        return rows

    def store_columns(self, columns: list[Any], address: Any, width: Any) -> None:
        """Vectors `width` bytes apart, from `address` on."""
        for number, column in enumerate(columns):
            self.store(column, self.builder.add(address, self.builder.mul(width, I64(number))))

    def add_up_four(self, rows: list[Any]) -> list[Any]:
        """The sum over the 16 lanes of each of four vectors, in one order on every CPU: halves, then their halves."""
        a, b, c, d = rows
        low, high = list(range(8)), list(range(8, 16))
        ab, cd = (
            self.builder.fadd(
                self.picked(x, y, low + [16 + n for n in low]), self.picked(x, y, high + [16 + n for n in high])
            )
            for x, y in ((a, b), (c, d))
        )
        first = [section + n for section in (0, 8, 16, 24) for n in range(4)]
        total = self.builder.fadd(self.picked(ab, cd, first), self.picked(ab, cd, [n + 4 for n in first]))
        for width in (2, 1):
            first = [section + n for section in range(0, 8 * width, 2 * width) for n in range(width)]
            others = [n + width for n in first]
            total = self.builder.fadd(self.picked(total, total, first), self.picked(total, total, others))
        return [self.builder.extract_element(total, I32(n)) for n in range(4)]

    def sums(self, count: int, lanes: int = LANES) -> list[Any]:
        """Stack slots of f32 vectors, 0; LLVM keeps them in registers."""
        zero = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)
        return [cgutils.alloca_once_value(self.builder, zero) for _ in range(count)]

    def each(self, count: Any) -> Any:
        """A loop over 0 to `count`."""
        return cgutils.for_range(self.builder, count, intp=I64)

    def groups(self, n: Any) -> Any:
        """Groups of a row of `n` weights in blocks."""
        return self.builder.lshr(self.builder.add(n, I64(GROUP - 1)), I64(GROUP.bit_length() - 1))

    def scales(self, codes_end: Any, group: Any) -> Any:
        """f32 [4] of a row's f16 scales of one group, which begin at `codes_end`."""
        at = self.builder.add(codes_end, self.builder.mul(group, I64(8)))
        return self.widened(at, types.int16, 4)

    def widened_to(self, vector: Any, lanes: int) -> Any:
        """`vector` followed by zeros, `lanes` in all."""
        count = vector.type.count
        zeros = ir.Constant(vector.type, [0.0] * count)
        return self.picked(vector, zeros, [min(n, count) for n in range(lanes)])


@intrinsic
def weight_at(typing_context: Any, like: Any, address: Any) -> Any:
    """The bf16, f16 or f32 weight at `address`, as f32 (finite values)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], context.get_data_type(like.dtype).as_pointer())
        return _widen(builder, builder.load(pointer), like.dtype, None)

    fits = isinstance(like, types.Array) and like.dtype in FLOATS
    return (types.float32(like, types.int64), generate) if fits else None


@intrinsic
def as_f32(typing_context: Any, value: Any) -> Any:
    """A stored f32, or f16 as int16, or a code of int8, as f32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.int8:
            return builder.sitofp(args[0], F32)
        return _widen(builder, args[0], value, None, "f16c" in target_features(context))

    return (types.float32(value), generate) if value in (types.float32, types.int16, types.int8) else None


@intrinsic
def as_stored(typing_context: Any, like: Any, value: Any) -> Any:
    """The f32 `value` as an array like `like` stores it: as it is, or as the nearest f16 there is, infinity none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like.dtype == types.float32:
            return args[1]
        return _as_f16(builder, args[1], "f16c" in target_features(context))

    fits = isinstance(like, types.Array) and like.dtype in (types.float32, types.int16) and value == types.float32
    return (like.dtype(like, value), generate) if fits else None


@intrinsic
def fetch(typing_context: Any, row: Any, at: Any) -> Any:
    """Fetch the cache line of row[at] into L2; row is an array of one axis."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        code.fetch(builder.add(code.data(row, args[0]), builder.mul(args[1], I64(row.dtype.bitwidth // 8))))
        return context.get_dummy_value()

    return types.void(row, types.intp), generate


@intrinsic
def fetch_at(typing_context: Any, address: Any) -> Any:
    """Fetch the cache line of `address` into L2; it may lie anywhere, as a fetch never faults."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Code(context, builder).fetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate
