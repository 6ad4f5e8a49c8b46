"""Tiles of a product of many tokens: sums of 6 tokens by a panel of columns, all in registers.

A panel has 64 columns with AVX-512 and 16 without. Each element is one sum over k in the order of k, so it has the same
bits whatever the tile and the CPU, but for fused products. Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008: a panel of weights stays in the nearest cache while all tokens pass by.

Where weights are floats: `panel` f32 [k, columns], x f32 [k, 6]. Where they are codes in blocks of 32: pairs of k side
by side, `panel` i16 [k / 2, columns, 2] with scales f32 [k / 32, columns], x i16 [k / 2, 6, 2] with scales
f32 [k / 32, 6]; a block's sum in integers is exact, times both scales it joins a sum of f32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.contract import BLOCK
from cpu_kernels.lanes import F32, I16, I32, I64, LANES, Code, constant

TOKENS = 6  # of a tile
_WIDEST = 4 * LANES


def _vectors(code: Code) -> int:
    """Vectors of 16 lanes of a panel: 6 tokens' sums fill 24 of 32 registers of 512 bits, or 12 of 16 of 256."""
    return 4 if "avx512f" in code.features else 1


def tile_vectors(code: Code) -> int:
    """Vectors of sums of a tile of 6 tokens."""
    return TOKENS * _vectors(code)


@intrinsic
def panel_columns(typing_context: Any) -> Any:
    """Columns of a panel on this CPU."""
    return types.int64(), lambda context, builder, signature, args: I64(LANES * _vectors(Code(context, builder)))


MOST_COLUMNS = _WIDEST  # of a panel on any CPU


class Loop:
    """A loop over 0 to `count` that keeps values in registers: `carried` at its start, what `step` makes of them after.

    As phi nodes, since stack slots of 24 vectors are not always seen through by LLVM.
    """

    def __init__(self, builder: Any, count: Any, carried: list[Any]) -> None:
        self.builder, before = builder, builder.block
        self._body, self._end = builder.append_basic_block("tile"), builder.append_basic_block("tile_end")
        self._count = count
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.index = builder.phi(I64)
        self.index.add_incoming(I64(0), before)
        self.values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(self.values, carried, strict=True):
            phi.add_incoming(value, before)

    def close(self, values: list[Any], step: int = 1) -> list[Any]:
        """End the body; returns the values after the last pass."""
        builder, after = self.builder, self.builder.block
        following = builder.add(self.index, I64(step))
        self.index.add_incoming(following, after)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, after)
        builder.cbranch(builder.icmp_signed("<", following, self._count), self._body, self._end)
        builder.position_at_end(self._end)
        return values


def _scalar(code: Code, address: Any, kind: Any, offset: int) -> Any:
    loaded = code.load(address, kind, 1, offset, 4)
    return code.builder.extract_element(loaded, I32(0))


def _add_to(code: Code, out: Any, stride: Any, tokens: int, sums: list[Any]) -> None:
    """out[token, column] += sums."""
    builder, vectors = code.builder, len(sums) // tokens
    for token in range(tokens):
        row = builder.add(out, builder.mul(stride, I64(token)))
        for part in range(vectors):
            at = builder.add(row, I64(4 * LANES * part))
            code.store(builder.fadd(code.load(at, F32, LANES, 0, 4), sums[token * vectors + part]), at)


def _float_sums(code: Code, tokens: int, panel: tuple[Any, Any], x: tuple[Any, Any, Any], k: Any) -> list[Any]:
    """f32 sums over k of a panel, its address and bytes from one row to the next, times `x`: address, bytes from one k
    to the next, and from one token to the next."""
    builder, vectors, (weights, width), (inputs, along, across) = code.builder, _vectors(code), panel, x
    loop = Loop(builder, k, [constant(F32, 0.0, LANES)] * (tokens * vectors))
    row, at = (builder.add(start, builder.mul(loop.index, by)) for start, by in ((weights, width), (inputs, along)))
    read = [code.load(row, F32, LANES, 4 * LANES * part, 4) for part in range(vectors)]
    sums = list(loop.values)
    for token in range(tokens):
        value = code.splat(_scalar(code, builder.add(at, builder.mul(across, I64(token))), F32, 0), LANES)
        for part in range(vectors):
            sums[token * vectors + part] = code.fused(read[part], value, sums[token * vectors + part])
    return loop.close(sums)


def _float_tile(tokens: int) -> Any:
    @intrinsic
    def tile(typing_context: Any, panel: Any, width: Any, x: Any, k: Any, out: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code, (panel, width, x, k, out, stride) = Code(context, builder), args
            sums = _float_sums(code, tokens, (panel, width), (x, I64(4 * TOKENS), I64(4)), k)
            _add_to(code, out, stride, tokens, sums)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6), generate

    return tile


@intrinsic
def row_tile(
    typing_context: Any, panel: Any, width: Any, x: Any, spacing: Any, k: Any, out: Any, stride: Any
) -> Any:  # fmt: skip
    """As the float tile of 6 tokens, of inputs that are rows, [6, k] with `spacing` bytes from one to the next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (panel, width, x, spacing, k, out, stride) = Code(context, builder), args
        sums = _float_sums(code, TOKENS, (panel, width), (x, I64(4), spacing), k)
        _add_to(code, out, stride, TOKENS, sums)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7), generate


def add_pairs(code: Code, a: Any, b: Any, total: Any) -> Any:
    """total + a[2l] b[2l] + a[2l + 1] b[2l + 1], i32 [16] of pairs in i32 [16]."""
    builder, wide = code.builder, ir.VectorType(I32, LANES)
    if "avx512vnni" in code.features:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(wide, [wide] * 3), "llvm.x86.avx512.vpdpwssd.512"
        )
        return builder.call(function, [total, a, b])
    pairs = ir.VectorType(I16, 2 * LANES)
    return builder.add(total, code.pair_products(builder.bitcast(a, pairs), builder.bitcast(b, pairs)))


def _code_tile(tokens: int) -> Any:
    @intrinsic
    def tile(
        typing_context: Any, panel: Any, width: Any, scales: Any, x: Any, x_scales: Any, blocks: Any, out: Any,
        stride: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code, (panel, width, scales, x, x_scales, blocks, out, stride) = Code(context, builder), args
            vectors = _vectors(code)
            zero = constant(I32, 0, LANES)
            with code.each(blocks) as block:
                pairs = BLOCK // 2
                loop = Loop(builder, I64(pairs), [zero] * (tokens * vectors))
                k = builder.add(builder.mul(block.index, I64(pairs)), loop.index)
                row = builder.add(panel, builder.mul(k, width))
                weights = [code.load(row, I32, LANES, 4 * LANES * part, 4) for part in range(vectors)]
                inputs, sums = builder.add(x, builder.mul(k, I64(4 * TOKENS))), list(loop.values)
                for token in range(tokens):
                    value = code.splat(_scalar(code, inputs, I32, 4 * token), LANES)
                    for part in range(vectors):
                        at = token * vectors + part
                        sums[at] = add_pairs(code, weights[part], value, sums[at])
                sums = loop.close(sums)
                of = builder.add(scales, builder.mul(block.index, width))
                steps = [code.load(of, F32, LANES, 4 * LANES * part, 4) for part in range(vectors)]
                of = builder.add(x_scales, builder.mul(block.index, I64(4 * TOKENS)))
                for token in range(tokens):
                    scale = code.splat(_scalar(code, of, F32, 4 * token), LANES)
                    line = builder.add(out, builder.mul(stride, I64(token)))
                    for part in range(vectors):
                        number = builder.sitofp(sums[token * vectors + part], ir.VectorType(F32, LANES))
                        at = builder.add(line, I64(4 * LANES * part))
                        total = code.fused(number, builder.fmul(steps[part], scale), code.load(at, F32, LANES, 0, 4))
                        code.store(total, at)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8), generate

    return tile


# Of as many tokens of a group as there are, in twos: each costs a kernel its compiling.
float_tile, float_tile_4, float_tile_2 = (_float_tile(tokens) for tokens in (6, 4, 2))
code_tile, code_tile_4, code_tile_2 = (_code_tile(tokens) for tokens in (6, 4, 2))
