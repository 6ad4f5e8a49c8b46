"""The CPU's tile unit (AMX): eight tiles of 16 rows of 64 bytes, and an instruction that multiplies two of bf16.

The system saves tiles for processes alone that have asked for it, once: `tiles_usable` asks. A worker sets the tiles'
sizes before it uses them, and gives them up afterwards: the system saves what is in use at every switch of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from cpu_kernels.compiled import target_features
from cpu_kernels.lanes import I8, I32, I64, Code

ROWS, ROW_BYTES = 16, 64  # of a tile
TILE_BYTES = ROWS * ROW_BYTES
_TILES, _PALETTE = 8, 1
# What Linux on x86-64 calls them; the number is that of the tiles' contents among the states that a CPU saves.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def tiles_usable() -> bool:
    """Whether kernels may use tiles: the CPU that they are compiled for has them, and the system lets this process."""
    needed = {"amx-tile", "amx-bf16", "avx512f", "avx512bw"}
    if not needed <= target_features(cpu_target.target_context) or not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        permission: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
        return permission == 0
    return False


class TileUnit:
    """Writes the unit's instructions; tiles are numbered 0 to 7, addresses and strides are in bytes."""

    def __init__(self, code: Code) -> None:
        self._builder = code.builder

    def configure(self) -> None:
        """Make every tile 16 rows of 64 bytes, all zeros."""
        sizes = bytearray(64)
        sizes[0] = _PALETTE
        for tile in range(_TILES):
            sizes[16 + 2 * tile], sizes[48 + tile] = ROW_BYTES, ROWS
        words = [int.from_bytes(sizes[at : at + 4], "little") for at in range(0, 64, 4)]
        kind = ir.VectorType(I32, len(words))
        place = cgutils.alloca_once(self._builder, kind)
        self._builder.store(ir.Constant(kind, words), place)
        self._call("ldtilecfg", self._builder.bitcast(place, I8.as_pointer()))

    def release(self) -> None:
        self._call("tilerelease")

    def load(self, tile: int, address: Any, stride: Any) -> None:
        """A tile's rows from memory, `stride` bytes apart."""
        self._call("tileloadd64", I8(tile), self._pointer(address), stride)

    def store(self, tile: int, address: Any, stride: Any) -> None:
        self._call("tilestored64", I8(tile), self._pointer(address), stride)

    def dot(self, to: int, a: int, b: int) -> None:
        """to[m, n] += the sum over k of a[m, 2k] b[k, 2n] + a[m, 2k + 1] b[k, 2n + 1]; f32 of bf16, in tiles of 16 x 16
        and 16 x 32. Even and odd sums are of fused products in the order of k; what is below 2^-126 is 0."""
        self._call("tdpbf16ps", I8(to), I8(a), I8(b))

    def _pointer(self, address: Any) -> Any:
        return self._builder.inttoptr(address, I8.as_pointer())

    def _call(self, name: str, *args: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in args])
        function = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.x86.{name}")
        self._builder.call(function, args)


def row_stride() -> Any:
    """Bytes from one row to the next of a tile that lies in memory as one piece."""
    return I64(ROW_BYTES)
