"""Rows in blocks of int8 and int4: codes, then an f16 scale for each block of 32; four blocks are a group.

Products are of integers: codes with an input of 16 bits (`inputs.py`), each block's sum times its scales. Sums of
scaled rows are of floats; those of int4 rows lie in another order, which `row_sum.finish` puts right: within a group of
128, the 16 even columns of each of the four blocks, then the odd ones, as the 32-bit lanes of a group hold them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.contract import BLOCK, GROUP, INT4_OFFSET
from cpu_kernels.lanes import F32, I8, I16, I32, I64, LANES, Code, constant
from cpu_kernels.row_type import FourRows, Panel, RowType, Sums

_GROUP_BITS = I64(GROUP.bit_length() - 1)


class BlockRows(RowType):
    """What rows of int8 and of int4 codes have in common."""

    has_tail = False

    def widen(self, code: Code, row: Any, part: tuple[Any, Any], end: Any, out: Any) -> None:
        builder, wide, scales_at = code.builder, ir.VectorType(I32, BLOCK), code.builder.add(row, end)
        first = builder.lshr(part[0], _GROUP_BITS)
        with code.each(builder.sub(code.groups(part[1]), first)) as loop:
            group = builder.add(first, loop.index)
            scales = code.scales(scales_at, group)
            base = builder.add(out, builder.mul(loop.index, I64(4 * GROUP)))
            for block in range(GROUP // BLOCK):
                codes = builder.sext(self._codes(code, row, group, block), wide)
                number = builder.sitofp(codes, ir.VectorType(F32, BLOCK))
                for half in range(BLOCK // LANES):
                    value = builder.fmul(code.slice(number, half * LANES, LANES), code.lane(scales, block))
                    code.store(value, builder.add(base, I64(4 * (BLOCK * block + LANES * half))))

    def panel(self, code: Code, rows: list[Any], group: Any, end: Any, to: Panel) -> None:
        builder = code.builder
        scales = [code.scales(builder.add(row, end), group) for row in rows]
        for block in range(GROUP // BLOCK):
            pairs = [builder.bitcast(self._codes(code, row, group, block), ir.VectorType(I32, LANES)) for row in rows]
            at = builder.add(to.pairs, builder.mul(to.width, I64(BLOCK // 2 * block)))
            code.store_columns(code.transposed(pairs), at, to.width)
            line = builder.add(to.scales, builder.mul(to.width, I64(block)))
            for number, four in enumerate(scales):
                code.store(builder.extract_element(four, I32(block)), builder.add(line, I64(4 * number)))

    @abstractmethod
    def _codes(self, code: Code, row: Any, group: Any, block: int) -> Any:
        """The codes of one block of a group, i16 [32]."""


class Int8Rows(BlockRows):
    """Codes of int8."""

    def dot(self, code: Code, rows: FourRows, v: list[Any], n: Any) -> list[Any]:
        builder, groups = code.builder, code.groups(n)
        ends = builder.mul(groups, I64(GROUP))
        _fetch_dot_scales(code, rows.ahead, ends, groups)
        _put_scales(code, [builder.add(row, ends) for row in rows.addresses], v[2], None, v[5], groups)
        return self.dot_codes(code, rows, v[1], _scale_tables(code, v[5], groups), groups)

    def dot_with_scales(self, code: Code, rows: FourRows, v: list[Any], n: Any) -> list[Any]:
        """`dot`, and each row's sum of its scales times the f32 [P / 32] at v[4]: eight f32."""
        groups = code.groups(n)
        ends = code.builder.mul(groups, I64(GROUP))
        _fetch_dot_scales(code, rows.ahead, ends, groups)
        addresses = [code.builder.add(row, ends) for row in rows.addresses]
        scaled = _put_scales(code, addresses, v[2], v[4], v[5], groups)
        sums = self.dot_codes(code, rows, v[1], _scale_tables(code, v[5], groups), groups)
        return [*sums, *code.add_up_four([code.widened_to(part, LANES) for part in scaled])]

    def dot_codes(self, code: Code, rows: FourRows, x: Any, tables: list[Any], groups: Any) -> list[Any]:
        """Codes times an input of 16 bits at `x`; each block's sum times its f32 in the row's table."""
        builder = code.builder
        sums = [code.sums(1)[0] for _ in rows.addresses]
        with code.each(groups) as loop:
            offset = builder.mul(loop.index, I64(GROUP))
            code.fetch_lines(rows.ahead, offset, GROUP)
            x_at = builder.add(x, builder.mul(loop.index, I64(2 * GROUP)))
            for block in range(GROUP // BLOCK):
                inputs = code.load(x_at, I16, BLOCK, block * 2 * BLOCK, 2)
                for row, table, total in zip(rows.addresses, tables, sums, strict=True):
                    stored = code.load(builder.add(row, offset), I8, BLOCK, block * BLOCK)
                    codes = builder.sext(stored, ir.VectorType(I16, BLOCK))
                    _add_block(code, codes, inputs, table, loop.index, block, total)
        return code.add_up_four([builder.load(total) for total in sums])

    def sum(self, code: Code, rows: FourRows, scales: list[Any], to: Sums, part: tuple[Any, Any], end: Any) -> None:
        builder = code.builder
        _fetch_sum_scales(code, rows.ahead, part, end)
        _put_steps(code, rows, scales, to.tables, None, part, end)
        with cgutils.for_range_slice(builder, *part, I64(BLOCK), intp=I64) as (column, _):
            at, offset = builder.add(to.sums, builder.mul(column, I64(4))), builder.lshr(column, I64(3))
            code.fetch_lines(rows.ahead, column, BLOCK)
            for half in range(BLOCK // LANES):
                total = code.load(at, F32, LANES, half * LANES * 4, 4)
                for row, table in zip(rows.addresses, to.tables, strict=True):
                    codes = code.load(builder.add(row, column), I8, LANES, half * LANES)
                    wide = builder.sitofp(builder.sext(codes, ir.VectorType(I32, LANES)), ir.VectorType(F32, LANES))
                    total = code.fused(wide, _step(code, table, offset, 0), total)
                code.store(total, builder.add(at, I64(half * LANES * 4)))

    def _codes(self, code: Code, row: Any, group: Any, block: int) -> Any:
        at = code.builder.add(row, code.builder.mul(group, I64(GROUP)))
        return code.builder.sext(code.load(at, I8, BLOCK, block * BLOCK), ir.VectorType(I16, BLOCK))


class Int4Rows(BlockRows):
    """Nibbles, which carry an offset of 8: its part of each sum is taken off at the end."""

    columns_unit = GROUP
    in_order = False
    terms = 2  # 3 bits of a code by the 11 of its scale

    def dot(self, code: Code, rows: FourRows, v: list[Any], n: Any) -> list[Any]:
        builder, groups = code.builder, code.groups(n)
        sums = [code.sums(1)[0] for _ in rows.addresses]
        ends = builder.mul(groups, I64(GROUP // 2))
        _fetch_dot_scales(code, rows.ahead, ends, groups)
        offsets = _put_scales(code, [builder.add(row, ends) for row in rows.addresses], v[3], v[4], v[5], groups)
        tables = _scale_tables(code, v[5], groups)
        with code.each(groups) as loop:
            offset = builder.mul(loop.index, I64(GROUP // 2))
            code.fetch_lines(rows.ahead, offset, GROUP // 2)
            words = [code.load(builder.add(row, offset), I16, BLOCK) for row in rows.addresses]
            x_at = builder.add(v[1], builder.mul(loop.index, I64(2 * GROUP)))
            for block in range(GROUP // BLOCK):
                inputs = code.load(x_at, I16, BLOCK, block * 2 * BLOCK, 2)
                for word, table, total in zip(words, tables, sums, strict=True):
                    _add_block(code, _nibbles(code, word, block), inputs, table, loop.index, block, total)
        whole = code.add_up_four([builder.load(total) for total in sums])
        taken = code.add_up_four([code.widened_to(offset, LANES) for offset in offsets])
        return [builder.fsub(a, b) for a, b in zip(whole, taken, strict=True)]

    def sum(self, code: Code, rows: FourRows, scales: list[Any], to: Sums, part: tuple[Any, Any], end: Any) -> None:
        builder = code.builder
        _fetch_sum_scales(code, rows.ahead, part, end)
        _put_steps(code, rows, scales, to.tables, to.offsets, part, end)
        with cgutils.for_range_slice(builder, *part, I64(GROUP), intp=I64) as (column, _):
            at, offset = builder.add(to.sums, builder.mul(column, I64(4))), builder.lshr(column, I64(1))
            code.fetch_lines(rows.ahead, offset, GROUP // 2)
            words = [code.load(builder.add(row, offset), I32, LANES) for row in rows.addresses]
            step_at = builder.lshr(column, I64(2))
            for number in range(8):
                total = code.load(at, F32, LANES, number * LANES * 4, 4)
                for word, table in zip(words, to.tables, strict=True):
                    if number < 7:
                        codes = builder.and_(word, constant(I32, 15 << 4 * number, LANES))
                    else:
                        codes = builder.lshr(word, constant(I32, 28, LANES))
                    wide = builder.sitofp(codes, ir.VectorType(F32, LANES))
                    total = code.fused(wide, _step(code, table, step_at, number), total)
                code.store(total, builder.add(at, I64(number * LANES * 4)))

    def _codes(self, code: Code, row: Any, group: Any, block: int) -> Any:
        builder = code.builder
        words = code.load(builder.add(row, builder.mul(group, I64(GROUP // 2))), I16, BLOCK)
        shifted = builder.lshr(words, constant(I16, 4 * block, BLOCK))
        return builder.sub(builder.and_(shifted, constant(I16, 15, BLOCK)), constant(I16, INT4_OFFSET, BLOCK))


def _nibbles(code: Code, words: Any, number: int) -> Any:
    """Codes of block `number` in a group's i16 [32], where they lie, but for the last, which is shifted down."""
    if number == GROUP // BLOCK - 1:
        return code.builder.lshr(words, constant(I16, 12, BLOCK))
    return code.builder.and_(words, constant(I16, 15 << 4 * number, BLOCK))


# Of dot products


def _fetch_dot_scales(code: Code, ahead: list[Any], codes_bytes: Any, groups: Any) -> None:
    """Fetch what lies after the codes of rows: 8 bytes of scales a group."""
    with cgutils.for_range_slice(code.builder, I64(0), groups, I64(8), intp=I64) as (group, _):
        code.fetch_lines(ahead, code.builder.add(codes_bytes, code.builder.mul(group, I64(8))), 64)


def _put_scales(code: Code, ends: list[Any], x_scales: Any, x_sums: Any, scratch: Any, groups: Any) -> list[Any]:
    """Write each row's block scales times the input's to `scratch`, f32 [4, 4 groups]; where `x_sums` is given, return
    each row's sum of scales times those. The products read their scales from there by broadcasting loads, which cost no
    vector operation: int4 rows in the cache went from 21 to 25 GB/s."""
    builder = code.builder
    totals = [code.sums(1, 4)[0] for _ in ends]
    row_bytes = builder.mul(groups, I64(16))
    with code.each(groups) as loop:
        step = builder.mul(loop.index, I64(16))
        inputs = code.load(x_scales, F32, 4, step, 4)
        for number, (end, total) in enumerate(zip(ends, totals, strict=True)):
            stored = code.scales(end, loop.index)
            at = builder.add(builder.add(scratch, builder.mul(row_bytes, I64(number))), step)
            code.store(builder.fmul(inputs, stored), at)
            if x_sums is not None:
                offset = code.fused(code.load(x_sums, F32, 4, step, 4), stored, builder.load(total))
                builder.store(offset, total)
    return [builder.load(total) for total in totals]


def _scale_tables(code: Code, scratch: Any, groups: Any) -> list[Any]:
    """Where `_put_scales` wrote each row's scales."""
    row_bytes = code.builder.mul(groups, I64(16))
    return [code.builder.add(scratch, code.builder.mul(row_bytes, I64(number))) for number in range(4)]


def _add_block(code: Code, codes: Any, inputs: Any, table: Any, group: Any, block: int, total: Any) -> None:
    """total += codes . inputs, lane by lane, times the block's scale in `table`."""
    builder = code.builder
    at = builder.add(builder.add(table, builder.mul(group, I64(16))), I64(4 * block))
    scale = code.splat(builder.extract_element(code.load(at, F32, 1, 0, 4), I32(0)), LANES)
    products = builder.sitofp(code.pair_products(codes, inputs), ir.VectorType(F32, LANES))
    builder.store(code.fused(products, scale, builder.load(total)), total)


# Of sums


def _fetch_sum_scales(code: Code, ahead: list[Any], part: tuple[Any, Any], codes_bytes: Any) -> None:
    """Fetch the scales of columns [first, last) of rows: a line for 1024."""
    builder = code.builder
    with cgutils.for_range_slice(builder, *part, I64(1024), intp=I64) as (column, _):
        code.fetch_lines(ahead, builder.add(codes_bytes, builder.lshr(column, I64(4))), 64)


def _put_steps(
    code: Code, rows: FourRows, scales: list[Any], tables: list[Any], taken: Any, part: tuple[Any, Any], end: Any
) -> None:
    """Write what each row's codes of each block are multiplied with to `tables`, f32 [row, 2 P / 32].

    int8: row scale times block scale. int4, where `taken` is given: for each group, that over 16^n for the n-th nibble
    of a 32-bit lane, as codes stay where they lie; the last is shifted down. Their offset of 8 goes to `taken`
    [P / 32].
    The sums read these by broadcasting loads, which cost no vector operation.
    """
    builder = code.builder
    shrink = [[16.0**-n for n in range(4)], [16.0**-4, 16.0**-5, 16.0**-6, 1.0]]
    factors = [ir.Constant(ir.VectorType(F32, 4), numbers) for numbers in shrink]
    wide = [code.splat(scale, 4) for scale in scales]
    start = builder.and_(part[0], I64(-GROUP))  # whole groups, so that no read leaves the row
    with cgutils.for_range_slice(builder, start, part[1], I64(GROUP), intp=I64) as (column, _):
        scale_at = builder.add(end, builder.lshr(column, I64(4)))
        taken_at = None if taken is None else builder.add(taken, builder.lshr(column, I64(3)))
        offset = None if taken is None else code.load(taken_at, F32, 4, align=4)
        for number, (row, scale) in enumerate(zip(rows.addresses, wide, strict=True)):
            steps = builder.fmul(code.widened(builder.add(row, scale_at), types.int16, 4), scale)
            table = builder.add(tables[number], builder.lshr(column, I64(3 if taken is None else 2)))
            if taken is None:
                code.store(steps, table)
            else:
                offset = builder.fadd(offset, steps)
                for half, factor in enumerate(factors):
                    code.store(builder.fmul(steps, factor), builder.add(table, I64(16 * half)))
        if taken is not None:
            code.store(offset, taken_at)


def _step(code: Code, table: Any, offset: Any, number: int) -> Any:
    loaded = code.load(code.builder.add(table, offset), F32, 1, 4 * number, 4)
    return code.splat(code.builder.extract_element(loaded, I32(0)), LANES)
