"""The tile unit in plain code, for CPUs without: what its instructions do, in NumPy and as LLVM code for kernels."""

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from cpu_kernels.lanes import F32, I32, I64, LANES, constant
from cpu_kernels.tile_unit import ROW_BYTES, ROWS, TILE_BYTES

_TOP = -0x10000  # of an i32 of a pair, its second bf16


def bf16(bits):
    """The f32 that bf16s are, as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dot_ref(to, a, b):
    """`TileUnit.dot` of f32 [16, 16], and bf16 as uint16 [16, 32] and [16, 32]; products are exact in f64, and fused
    where a sum of f64 rounds no bit that f32 keeps, as it does for numbers of like size."""
    even, odd = (np.zeros((ROWS, LANES), np.float32) for _ in range(2))
    wide, pairs = bf16(a).astype(np.float64), bf16(b).astype(np.float64).reshape(ROWS, LANES, 2)
    for k in range(ROWS):
        even = (even + wide[:, 2 * k, None] * pairs[k, :, 0]).astype(np.float32)
        odd = (odd + wide[:, 2 * k + 1, None] * pairs[k, :, 1]).astype(np.float32)
    return to + (even + odd)


class SoftTileUnit:
    """`cpu_kernels.tile_unit.TileUnit` without one: tiles lie on the stack of the function."""

    def __init__(self, code):
        self._code, self._builder, self._tiles = code, code.builder, {}

    def configure(self):
        pass

    def release(self):
        pass

    def load(self, tile, address, stride):
        for row in range(ROWS):
            at = self._builder.add(address, self._builder.mul(stride, I64(row)))
            self._code.store(self._code.load(at, I32, LANES, 0, 4), self._row(tile, I64(row)))

    def store(self, tile, address, stride):
        for row in range(ROWS):
            at = self._builder.add(address, self._builder.mul(stride, I64(row)))
            self._code.store(self._code.load(self._row(tile, I64(row)), I32, LANES, 0, 4), at)

    def dot(self, to, a, b):
        code, builder, wide = self._code, self._builder, ir.VectorType(F32, LANES)

        def both(pairs):
            low = builder.shl(pairs, constant(I32, 16, LANES))
            return [builder.bitcast(half, wide) for half in (low, builder.and_(pairs, constant(I32, _TOP, LANES)))]

        with code.each(I64(ROWS)) as loop:
            sums = [constant(F32, 0.0, LANES)] * 2
            values = code.load(self._row(a, loop.index), I32, LANES, 0, 4)
            for k in range(ROWS):
                pairs = both(code.load(self._row(b, I64(k)), I32, LANES, 0, 4))
                of = both(code.lane(values, k))
                sums = [code.fused(x, y, total) for x, y, total in zip(of, pairs, sums, strict=True)]
            at = self._row(to, loop.index)
            code.store(builder.fadd(code.load(at, F32, LANES, 0, 4), builder.fadd(*sums)), at)

    def _row(self, tile, row):
        if tile not in self._tiles:
            self._tiles[tile] = cgutils.alloca_once(self._builder, ir.ArrayType(I32, TILE_BYTES // 4))
        start = self._builder.ptrtoint(self._tiles[tile], I64)
        return self._builder.add(start, self._builder.mul(row, I64(ROW_BYTES)))
