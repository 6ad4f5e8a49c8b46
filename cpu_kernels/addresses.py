"""Arrays as addresses: what compiled code makes of an address, and tables that bring many arrays as one argument.

An argument that is an array costs a call 0.2 us with the GIL held, and more in a named tuple: the 60 buffers of the
decode step took 13 us a worker, one worker after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_COLUMNS = 3  # address, sizes of two axes


@intrinsic
def array_at(typing_context: Any, address: Any, shape: Any, dtype: Any) -> Any:
    """The C-contiguous array of a tuple of sizes and elements of `dtype` at `address`.

    Numba's own `carray` returns an array from a function, which takes reference counts.
    """
    if not isinstance(dtype, types.DTypeSpec) or not isinstance(shape, types.BaseTuple):
        return None
    kind, sizes = types.Array(dtype.dtype, len(shape), "C"), types.UniTuple(types.int64, len(shape))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _array(context, builder, kind, args[0], cgutils.unpack_tuple(builder, args[1]))

    return kind(types.int64, sizes, dtype), generate


@intrinsic
def scales_at(typing_context: Any, address: Any, shape: Any, like: Any) -> Any:
    """The f32 array of a tuple of sizes at `address`, where `like` is of int8, whose codes have scales; else None."""
    if not isinstance(like, types.Array) or not isinstance(shape, types.BaseTuple):
        return None
    sizes = types.UniTuple(types.int64, len(shape))
    kind = types.Array(types.float32, len(shape), "C") if like.dtype == types.int8 else types.none

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind == types.none:
            return context.get_dummy_value()
        return _array(context, builder, kind, args[0], cgutils.unpack_tuple(builder, args[1]))

    return kind(types.int64, sizes, like), generate


@intrinsic
def floats(typing_context: Any, address: Any, n: Any) -> Any:
    """The f32 vector of n elements at `address`, or an empty one for address 0."""
    kind = types.Array(types.float32, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        known = cgutils.is_not_null(builder, args[0])
        return _array(context, builder, kind, args[0], [builder.select(known, args[1], ir.IntType(64)(0))])

    return kind(types.int64, types.int64), generate


def _array(context: Any, builder: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
    """LLVM code for the C-contiguous array of type `kind` at `address`."""
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [size]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(length, strides[0]))
    array = context.make_array(kind)(context, builder)
    populate_array(array, builder.inttoptr(address, array.data.type), shape, strides, size, meminfo=None)
    return array._getvalue()


def address_table(arrays: Any) -> np.ndarray:
    """int64 [n, 3]: address and sizes of each array in `arrays`, a tuple of C-contiguous arrays and such tuples.

    The arrays must outlive it. Raises `ValueError` for an array that is not contiguous or has more than two axes.
    """
    return np.array([[array.ctypes.data, *array.shape, 1][:_COLUMNS] for array in _each(arrays)], np.int64)


def _each(arrays: Any) -> Iterator[np.ndarray]:
    if isinstance(arrays, tuple):
        for part in arrays:
            yield from _each(part)
    elif arrays.ndim in (1, 2) and arrays.flags.c_contiguous:
        yield arrays
    else:
        raise ValueError(f"expected contiguous arrays of 1 or 2 axes, got {arrays.shape} in strides {arrays.strides}")


def reader_of(example: Any) -> Any:
    """A function for compiled code that turns the `address_table` of arrays like `example` into those arrays.

    `example`: a tuple of arrays and such tuples, of whose types the result is.
    """
    kind = numba.typeof(example)

    @intrinsic
    def read(typing_context: Any, table: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = context.make_array(signature.args[0])(context, builder, args[0]).data
            return _Tables(context, builder, first).read(kind)

        return kind(table), generate

    return read


class _Tables:
    """LLVM code that reads a table, whose first element `first` points to, row by row."""

    def __init__(self, context: Any, builder: Any, first: Any) -> None:
        self._context, self._builder, self._next = context, builder, first

    def read(self, kind: Any) -> Any:
        """The array or tuple of type `kind` that the next rows describe."""
        if not isinstance(kind, types.Array):
            return self._context.make_tuple(self._builder, kind, [self.read(part) for part in kind])
        address, *shape = (self._column(n) for n in range(1 + kind.ndim))
        self._next = self._builder.gep(self._next, [ir.IntType(64)(_COLUMNS)])
        return _array(self._context, self._builder, kind, address, shape)

    def _column(self, number: int) -> Any:
        return self._builder.load(self._builder.gep(self._next, [ir.IntType(64)(number)]))
