"""Rows of floats, bf16, f16 and f32, which are multiplied in f32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import from_dtype

from cpu_kernels.contract import BLOCK, RowLayout
from cpu_kernels.lanes import F32, I64, LANES, Code
from cpu_kernels.row_type import FourRows, RowType, Sums

STEP = 32  # elements of one step: two sums of 16 lanes for each of four rows


class FloatRows(RowType):
    """Rows of one type of floats. What follows the last whole step or vector of a row is left to the caller."""

    has_tail = True

    def __init__(self, layout: RowLayout, array: np.dtype) -> None:
        super().__init__(layout, array)
        self._kind: types.Type = from_dtype(array)
        self._size = array.itemsize
        self.terms = {"bf16": 1, "f16": 2, "f32": 3}[layout.name]

    def dot(self, code: Code, rows: FourRows, v: list[Any], n: Any) -> list[Any]:
        builder, size = code.builder, self._size
        sums = [code.sums(STEP // LANES) for _ in rows.addresses]
        with code.each(builder.lshr(n, I64(STEP.bit_length() - 1))) as loop:
            offset = builder.mul(loop.index, I64(STEP * size))
            code.fetch_lines(rows.ahead, offset, STEP * size)
            x_at = builder.add(v[0], builder.mul(loop.index, I64(STEP * 4)))
            for part in range(STEP // LANES):
                inputs = code.load(x_at, F32, LANES, part * LANES * 4, 4)
                for row, totals in zip(rows.addresses, sums, strict=True):
                    weights = code.widened(builder.add(row, offset), self._kind, LANES, part * LANES * size)
                    builder.store(code.fused(weights, inputs, builder.load(totals[part])), totals[part])
        return code.add_up_four([builder.fadd(builder.load(a), builder.load(b)) for a, b in sums])

    def dot_tokens(self, code: Code, rows: FourRows, tokens: list[Any], n: Any) -> list[list[Any]]:
        """`dot` for the inputs f32 at four addresses: four lists of four. Weights are widened once for all of them, two
        rows at a time, as 16 sums of 16 lanes fill half of the registers."""
        builder, size, found = code.builder, self._size, []
        steps = builder.lshr(n, I64(STEP.bit_length() - 1))
        for pair in (slice(0, 2), slice(2, 4)):
            sums = [[code.sums(STEP // LANES) for _ in tokens] for _ in rows.addresses[pair]]
            with code.each(steps) as loop:
                offset = builder.mul(loop.index, I64(STEP * size))
                code.fetch_lines(rows.ahead[pair], offset, STEP * size)
                x_at = [builder.add(x, builder.mul(loop.index, I64(STEP * 4))) for x in tokens]
                for part in range(STEP // LANES):
                    wide = [
                        code.widened(builder.add(row, offset), self._kind, LANES, part * LANES * size)
                        for row in rows.addresses[pair]
                    ]
                    for token, x in enumerate(x_at):
                        inputs = code.load(x, F32, LANES, part * LANES * 4, 4)
                        for weights, totals in zip(wide, sums, strict=True):
                            slot = totals[token][part]
                            builder.store(code.fused(weights, inputs, builder.load(slot)), slot)
            found += [[builder.fadd(builder.load(a), builder.load(b)) for a, b in totals] for totals in sums]
        return [code.add_up_four([row[token] for row in found]) for token in range(len(tokens))]

    def sum(self, code: Code, rows: FourRows, scales: list[Any], to: Sums, part: tuple[Any, Any], end: Any) -> None:
        builder, size = code.builder, self._size
        wide = [code.splat(scale, LANES) for scale in scales]
        with cgutils.for_range_slice(builder, *part, I64(BLOCK), intp=I64) as (column, _):
            at, offset = builder.add(to.sums, builder.mul(column, I64(4))), builder.mul(column, I64(size))
            code.fetch_lines(rows.ahead, offset, BLOCK * size)
            for half in range(BLOCK // LANES):
                total = code.load(at, F32, LANES, half * LANES * 4, 4)
                for row, scale in zip(rows.addresses, wide, strict=True):
                    weights = code.widened(builder.add(row, offset), self._kind, LANES, half * LANES * size)
                    total = code.fused(weights, scale, total)
                code.store(total, builder.add(at, I64(half * LANES * 4)))

    def widen(self, code: Code, row: Any, part: tuple[Any, Any], end: Any, out: Any) -> None:
        builder, (first, last) = code.builder, part
        count = builder.and_(builder.sub(last, first), I64(-LANES))
        row = builder.add(row, builder.mul(first, I64(self._size)))
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), intp=I64) as (start, _):
            value = code.widened(builder.add(row, builder.mul(start, I64(self._size))), self._kind, LANES)
            code.store(value, builder.add(out, builder.mul(start, I64(4))))
