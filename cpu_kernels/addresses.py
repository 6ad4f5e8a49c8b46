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
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from cpu_kernels.compiled import subroutine

_COLUMNS = 3  # address, sizes of two axes


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """`address` as `carray` takes it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@subroutine
def floats(address, n):  # type: ignore[no-untyped-def]
    """The f32 vector of n elements at `address`, or an empty one for address 0."""
    return carray(pointer(address), (n if address else 0,), np.float32)


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
        context, builder = self._context, self._builder
        address, *shape = (self._column(n) for n in range(1 + kind.ndim))
        self._next = builder.gep(self._next, [ir.IntType(64)(_COLUMNS)])
        item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        size = context.get_constant(types.intp, item)
        strides = [builder.mul(size, shape[1]), size] if kind.ndim == 2 else [size]
        array = context.make_array(kind)(context, builder)
        data = builder.inttoptr(address, array.data.type)
        populate_array(array, data, shape, strides, size, meminfo=None)
        return array._getvalue()

    def _column(self, number: int) -> Any:
        return self._builder.load(self._builder.gep(self._next, [ir.IntType(64)(number)]))
