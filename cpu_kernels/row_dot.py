"""Dot products of rows with one input, four rows at a time.

Four rows share the loads of the input and the sums over lanes at the end, which are a quarter of the work for int4 rows
of 2048 weights. A row's sum has the same order in any company; what is left over at the end of a range is computed as
four times the same row, which costs nothing to read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cpu_kernels.float_rows import STEP, FloatRows
from cpu_kernels.inputs import Input, round_input
from cpu_kernels.lanes import I64, Code, weight_at
from cpu_kernels.row_type import FourRows
from cpu_kernels.row_types import INT8, type_like

Rows = tuple[int, int, int, int]  # addresses


def prepare(like: np.ndarray, v: Input, d: int) -> None:
    """Bring `v` into the form that rows like `like` are multiplied with; a kernel's helper."""
    raise NotImplementedError("called from compiled code only")


@overload(prepare, inline="always", strict=False)
def _prepare(like: Any, v: Any, d: Any) -> Any:
    if not type_like(like).layout.in_blocks:
        return lambda like, v, d: None
    return lambda like, v, d: round_input(v, d)


def is_input(kind: Any) -> bool:
    """Whether a Numba type is that of `Input`."""
    return isinstance(kind, types.BaseTuple) and len(kind) == 6


_FOUR = types.UniTuple(types.int64, 4)


def _unpacked(code: Code, rows: Any, ahead: Any, v: Any, kinds: Any) -> tuple[FourRows, list[Any]]:
    """The rows' addresses, and those of the input's forms."""
    addresses, coming = ([code.builder.extract_value(four, number) for number in range(4)] for four in (rows, ahead))
    forms = [code.builder.extract_value(v, number) for number in range(6)]
    return FourRows(addresses, coming), [code.data(kinds[number], value) for number, value in enumerate(forms)]


@intrinsic
def _dot_rows(typing_context: Any, like: Any, rows: Any, ahead: Any, v: Any, n: Any) -> Any:
    kind = type_like(like)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (_, at, ahead, given, count) = Code(context, builder), args
        four, forms = _unpacked(code, at, ahead, given, v)
        return cgutils.pack_array(builder, kind.dot(code, four, forms, count))

    signature = types.UniTuple(types.float32, 4)(like, _FOUR, _FOUR, v, types.int64)
    return (signature, generate) if is_input(v) else None


@intrinsic
def dot_codes(typing_context: Any, like: Any, rows: Any, ahead: Any, v: Any, n: Any) -> Any:
    """`dot_four` for int8 codes without scales: rows like the int8 array `like`, padded with zeros to whole groups."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (_, at, ahead, given, count) = Code(context, builder), args
        four, forms = _unpacked(code, at, ahead, given, v)
        sums = INT8.dot_codes(code, four, forms[1], [forms[2]] * 4, code.groups(count))
        return cgutils.pack_array(builder, sums)

    signature = types.UniTuple(types.float32, 4)(like, _FOUR, _FOUR, v, types.int64)
    return (signature, generate) if type_like(like) is INT8 and is_input(v) else None


@intrinsic
def dot_with_scales(typing_context: Any, like: Any, rows: Any, ahead: Any, v: Any, n: Any) -> Any:
    """`dot_four` of rows of int8, and the sums of each row's scales times v[4]: f32 x 8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (_, at, ahead, given, count) = Code(context, builder), args
        four, forms = _unpacked(code, at, ahead, given, v)
        return cgutils.pack_array(builder, INT8.dot_with_scales(code, four, forms, count))

    signature = types.UniTuple(types.float32, 8)(like, _FOUR, _FOUR, v, types.int64)
    return (signature, generate) if type_like(like) is INT8 and is_input(v) else None


def _tails(like: np.ndarray, rows: Rows, v: Input, n: int, sums: tuple[float, ...]) -> tuple[float, ...]:
    raise NotImplementedError("called from compiled code only")


@overload(_tails, inline="always", strict=False)
def _add_tails(like: Any, rows: Any, v: Any, n: Any, sums: Any) -> Any:
    """Add what `_dot_rows` leaves: the last elements of rows of floats; blocks are padded and leave nothing."""
    if not type_like(like).has_tail:
        return lambda like, rows, v, n, sums: sums
    size = type_like(like).array.itemsize

    def add(like, rows, v, n, sums):  # type: ignore[no-untyped-def]
        (r0, r1, r2, r3), (s0, s1, s2, s3) = rows, sums
        for j in range(n & -STEP, n):
            x = v[0][j]
            s0 += weight_at(like, r0 + j * size) * x
            s1 += weight_at(like, r1 + j * size) * x
            s2 += weight_at(like, r2 + j * size) * x
            s3 += weight_at(like, r3 + j * size) * x
        return s0, s1, s2, s3

    return add


@njit(nogil=True, inline="always")
def dot_four(like, rows, ahead, v, n):  # type: ignore[no-untyped-def]
    """The rows of `n` weights at four addresses times the input `v`, which `prepare` has brought into form: f32 x 4.

    Meanwhile the rows at the addresses `ahead` are fetched into L2; they may lie anywhere, as a fetch never faults.
    """
    return _tails(like, rows, v, n, _dot_rows(like, rows, ahead, v, n))


TOKENS = 4  # whose products are taken together


@intrinsic
def _dot_tokens(typing_context: Any, like: Any, rows: Any, ahead: Any, inputs: Any, t: Any, n: Any) -> Any:
    """Rows of floats, but for their last elements, times the inputs of tokens t to t + 3: f32 x 16, token by token."""
    kind = type_like(like)
    if not isinstance(kind, FloatRows) or not is_input(inputs):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder)
        addresses, coming = ([builder.extract_value(args[at], number) for number in range(4)] for at in (1, 2))
        x = context.make_array(inputs[0])(context, builder, builder.extract_value(args[3], 0))
        width, _ = cgutils.unpack_tuple(builder, x.strides)
        first = builder.add(builder.ptrtoint(x.data, I64), builder.mul(args[4], width))
        tokens = [builder.add(first, builder.mul(width, I64(number))) for number in range(TOKENS)]
        found = kind.dot_tokens(code, FourRows(addresses, coming), tokens, args[5])
        return cgutils.pack_array(builder, [value for token in found for value in token])

    signature = types.UniTuple(types.float32, 4 * TOKENS)(like, _FOUR, _FOUR, inputs, types.int64, types.int64)
    return signature, generate


def put_products_of_tokens(
    like: np.ndarray, rows: Rows, ahead: Rows, inputs: Input, n: int, at: Rows, out: np.ndarray
) -> int:
    """out[t, at[k]] = row k of `dot_four` for as many tokens t as can be taken together, from the first on; returns how
    many those are, 0 for rows in blocks; a kernel's helper."""
    raise NotImplementedError("called from compiled code only")


@overload(put_products_of_tokens, strict=False)
def _of_tokens(like: Any, rows: Any, ahead: Any, inputs: Any, n: Any, at: Any, out: Any) -> Any:
    """Widening floats costs as much as their products; codes of blocks take little of theirs, and go token by token."""
    if not isinstance(type_like(like), FloatRows):
        return lambda like, rows, ahead, inputs, n, at, out: 0
    size = type_like(like).array.itemsize

    def together(like, rows, ahead, inputs, n, at, out):  # type: ignore[no-untyped-def]
        count = out.shape[0] & -TOKENS
        for t in range(0, count, TOKENS):
            sums = _dot_tokens(like, rows, ahead, inputs, t, n)
            for k in range(4 * TOKENS):
                row, x, total = rows[k % 4], inputs[0][t + k // 4], sums[k]
                for j in range(n & -STEP, n):
                    total += weight_at(like, row + j * size) * x[j]
                out[t + k // 4, at[k % 4]] = total
        return count

    return together
