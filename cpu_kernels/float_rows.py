"""Rows of floats, bf16, f16 and f32, which are multiplied in f32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import from_dtype

from cpu_kernels.contract import BLOCK, RowLayout
from cpu_kernels.lanes import F32, I32, I64, LANES, Code, constant
from cpu_kernels.row_type import FourRows, Panel, RowType, Sums

STEP = 32  # elements of one step: two sums of 16 lanes for each of four rows


class FloatRows(RowType):
    """Rows of one type of floats. What follows the last whole step or vector of a row is left to the caller."""

    has_tail = True

    def __init__(self, layout: RowLayout, array: np.dtype) -> None:
        super().__init__(layout, array)
        self._kind: types.Type = from_dtype(array)
        self._size = array.itemsize
        self.panel_unit = 2 * LANES if layout.name == "bf16" else LANES

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
        for column, at in self._vectors(code, part):
            value = code.widened(code.builder.add(row, column), self._kind, LANES)
            code.store(value, code.builder.add(out, code.builder.mul(at, I64(4))))

    def panel(self, code: Code, rows: list[Any], part: tuple[Any, Any], end: Any, to: Panel) -> None:
        builder = code.builder
        for column, at in self._vectors(code, part, self.panel_unit):
            line, here = builder.add(to.weights, builder.mul(at, to.width)), [builder.add(row, column) for row in rows]
            if self.panel_unit == LANES:
                wide = [code.widened(row, self._kind, LANES) for row in here]
                code.store_columns(code.transposed(wide), line, to.width)
                continue
            # Two bf16 move together and are widened after that, which halves the moves.
            twice, second = builder.mul(to.width, I64(2)), builder.add(line, to.width)
            pairs = code.transposed([code.load(row, I32, LANES, 0, 2) for row in here])
            for start, bits in (
                (line, [builder.shl(pair, constant(I32, 16, LANES)) for pair in pairs]),
                (second, [builder.and_(pair, constant(I32, -1 << 16, LANES)) for pair in pairs]),
            ):
                code.store_columns(bits, start, twice)

    def _vectors(self, code: Code, part: tuple[Any, Any], unit: int = LANES) -> Iterator[tuple[Any, Any]]:
        """A loop over whole units of columns: where each begins in a row, in bytes, and how many came before it."""
        builder, (first, last) = code.builder, part
        count = builder.and_(builder.sub(last, first), I64(-unit))
        with cgutils.for_range_slice(builder, I64(0), count, I64(unit), intp=I64) as (at, _):
            yield builder.mul(builder.add(first, at), I64(self._size)), at
