"""Inputs of products: the forms in which rows of floats and of blocks are multiplied with them (`lanes.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from cpu_kernels.blocks import padded
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import BLOCK, INT4_OFFSET

ROUND = np.float32(1.5 * 2**23)  # adding it leaves a whole number in the low bits of an f32
LARGEST = np.float32(32767)  # code of an input

# The input of a product, in the forms that the row types want: f32 [d]; int16 [P] and its scale f32 [P / 32]; for int4
# the scales that undo where a mask leaves a code, and 8 times the sums of the blocks, which take off the codes' offset;
# last, room for the products of those scales with the rows', f32 [4 P / 32].
Input = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def new_inputs(tokens: int, d: int) -> Input:
    """Buffers for inputs of up to `d` elements, one row a token."""
    width = padded(d)
    scales = (np.zeros((tokens, n * width // BLOCK), np.float32) for n in (1, 1, 1, 4))
    return (np.zeros((tokens, d), np.float32), np.zeros((tokens, width), np.int16), *scales)  # type: ignore[return-value]


@njit(nogil=True, inline="always")
def one_input(inputs, t):  # type: ignore[no-untyped-def]
    """Token t's rows of `inputs`."""
    return inputs[0][t], inputs[1][t], inputs[2][t], inputs[3][t], inputs[4][t], inputs[5][t]


@intrinsic
def larger(typing_context: Any, a: Any, b: Any) -> Any:
    """The larger of two f32, either of them where one is NaN. A loop of these vectorises, one of `max` does not: 1.2 ns
    less an element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *args, flags=flags), *args, flags=flags)

    return types.float32(types.float32, types.float32), generate


@njit(nogil=True, forceinline=True)
def largest(x, start, stop):  # type: ignore[no-untyped-def]
    top = np.float32(0)
    for j in range(start, stop):
        top = larger(top, np.float32(abs(x[j])))
    return top


@subroutine
def copy(source, n, target):  # type: ignore[no-untyped-def]
    """target[:n] = source[:n]. An assignment of slices compiles 3 s longer: it words an error for sizes that differ."""
    for j in range(n):
        target[j] = source[j]


@kernel
def round_input(v, d):  # type: ignore[no-untyped-def]
    """Fill the 16-bit forms of `v` from its f32 form, of which the first `d` elements are the input."""
    x, codes, scales, nibble_scales, sums, _ = v
    one = np.float32(1)
    for b in range(padded(d) // BLOCK):
        start, stop = min(BLOCK * b, d), min(BLOCK * b + BLOCK, d)
        top = largest(x, start, stop)
        scale = top / LARGEST
        inverse = LARGEST / top if top > np.float32(1e-30) else np.float32(0)
        for j in range(start, stop):
            rounded = np.float32(x[j] * inverse + ROUND)
            codes[j] = np.int16(rounded.view(np.int32))
        for j in range(stop, BLOCK * b + BLOCK):
            codes[j] = 0
        total = np.int32(0)
        for j in range(BLOCK * b, BLOCK * b + BLOCK):
            total += codes[j]
        scales[b] = scale
        k = b & 3
        nibble_scales[b] = scale * (one if k == 0 or k == 3 else np.float32(1 / 16) if k == 1 else np.float32(1 / 256))
        sums[b] = np.float32(INT4_OFFSET) * scale * np.float32(total)
