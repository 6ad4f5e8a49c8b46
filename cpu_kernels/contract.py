"""What the kernels of both devices agree on, written once: how rows of weights lie, codes of activations, the mailbox.

Nothing else of this package may `gpu_kernels` import; this file imports nothing of ours and no library, so that whoever
needs a size alone takes it from here too.

Rows in blocks are one run of bytes, codes first, then the scales, so that reading a neuron is one jump. They are padded
with zeros to P = `padded(d)`, a multiple of 128. With q the codes and s the scales, w[j] = q[j] * s[j // 32]:

    int8   P bytes q, -127 to 127, in order; P / 32 scales f16
    int4   P / 2 bytes q + 8, 0 to 15; P / 32 scales f16
           128 codes are 32 little-endian uint16: bits 4k to 4k + 3 of number j hold code 32 k + j, so that a mask
           gives the 16-bit lanes of one block, and no lane has to move
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

BLOCK = 32  # weights that share a scale
GROUP = 128  # weights to a multiple of which rows in blocks are padded
SCALE_BYTES = 2
INT4_OFFSET = 8  # int4 codes are stored with it added
MAX_BATCH = 32  # tokens that are computed at once, a row each; also the bits of a mask

# FATReLU leaves what is above a threshold as it is, the rest is 0; its name carries it: `fatrelu_0.01`. dReLU is a ReLU
# of gate and one of up.
ACTIVATION_CODES = {"relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "fatrelu": 5, "drelu": 6}
_CODE_BITS = 8


def activation_word(name: str) -> int:
    """The activation `name` as kernels take it: its code, and above that the bits of FATReLU's threshold as an f32.

    Raises `ValueError` for an unknown name.
    """
    base, threshold = split_activation(name)
    (bits,) = struct.unpack("<i", struct.pack("<f", threshold))
    return ACTIVATION_CODES[base] | bits << _CODE_BITS


def split_activation(name: str) -> tuple[str, float]:
    """The activation's name in `ACTIVATION_CODES`, and the threshold of FATReLU, at least 0, or 0.

    Raises `ValueError` for an unknown name.
    """
    base, _, rest = name.partition("_") if name.startswith("fatrelu") else (name, "", "")
    try:
        threshold = float(rest) if base == "fatrelu" else 0.0
    except ValueError:
        threshold = math.nan
    if base not in ACTIVATION_CODES or not 0 <= threshold < math.inf:
        known = ", ".join("fatrelu_THRESHOLD" if known == "fatrelu" else known for known in ACTIVATION_CODES)
        raise ValueError(f"unknown activation {name!r}, known are {known}")
    return base, threshold


DType = Literal["bf16", "f16", "f32", "int8", "int4"]
# Of products of many tokens. precise: as exactly as f32. fast: of 14 to 17 bits of each factor, see `panels.py`.
Precision = Literal["precise", "fast"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Blocks = Literal["int8", "int4"]


def padded(columns: int) -> int:
    """Codes of a row in blocks of so many weights."""
    return -(-columns // GROUP) * GROUP


@dataclass(frozen=True)
class RowLayout:
    """How rows of weights of the type `name` lie: `bits` of a weight, and the `group` of weights to a multiple of which
    rows are padded, 1 for floats."""

    name: DType
    bits: int
    group: int = 1

    @property
    def in_blocks(self) -> bool:
        """Whether weights are codes in blocks with scales, rather than floats."""
        return self.group > 1

    def codes_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights without its scales."""
        return -(-columns // self.group) * self.group * self.bits // 8

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights."""
        scales = padded(columns) // BLOCK * SCALE_BYTES if self.in_blocks else 0
        return self.codes_bytes(columns) + scales

    def elements(self, columns: int) -> int:
        """Elements of such a row in its array: weights, or in blocks bytes."""
        return self.row_bytes(columns) if self.in_blocks else columns


LAYOUTS: dict[str, RowLayout] = {
    layout.name: layout
    for layout in (
        RowLayout("bf16", 16),
        RowLayout("f16", 16),
        RowLayout("f32", 32),
        RowLayout("int8", 8, GROUP),
        RowLayout("int4", 4, GROUP),
    )
}


class Op(IntEnum):
    """What a request asks for: the FFN of given neurons of a layer, a whole layer, or the head."""

    FFN, LAYER, HEAD = 0, 1, 2


class Word(IntEnum):
    """Words of a request, one cache line. COUNT: neurons, or -1 for all cold ones of the layer. POSTED: number of the
    input in the box's x, which for one token comes ahead of its request; 0 where none did."""

    NUMBER, OP, LAYER, COUNT, TOKENS, POSITION, POSTED = 0, 1, 2, 3, 4, 5, 6


ALL_COLD = -1  # as COUNT of a request


class Flag(IntEnum):
    """Words of the box's flags, each in cache lines of its own. DONE: number of the last answer; STOP: the workers are
    to go home; READY: they have begun to wait for requests."""

    DONE, STOP, ARRIVED, READY = 0, 16, 32, 48


REQUEST_WORDS, FLAG_WORDS = 16, 64  # whole pairs of cache lines
