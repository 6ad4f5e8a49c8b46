"""The types of a GGUF file's tensors: sizes, their numbers as f32, and Q8_0 and Q4_0 as our rows in blocks.

    Q8_0   34 bytes of 32 weights: f16 scale, 32 codes
    Q4_0   18 bytes of 32 weights: f16 scale, 16 bytes: low halves are codes 0 to 15, high ones 16 to 31, each + 8

The numbers are those of our int8 and int4 (`cpu_kernels.contract`), only the bytes lie otherwise. All other types of
blocks are widened by the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpu_kernels.blocks import FORMATS
from cpu_kernels.contract import BLOCK, GROUP, INT4_OFFSET, LAYOUTS, Blocks, padded
from hybrid.errors import InputError, ModelError

_INSTALL = "pip install hybrid-inference[gguf]"


@dataclass(frozen=True)
class GGUFType:
    """A type: its name, the weights of a block and its bytes.

    most: of a type of blocks, where f16 scales lie in a block, and how many times each a weight can be at most; empty
    where that is not so simple.
    """

    name: str
    block: int
    nbytes: int
    most: tuple[tuple[int, int], ...] = ()


TYPES: dict[int, GGUFType] = {
    0: GGUFType("F32", 1, 4),
    1: GGUFType("F16", 1, 2),
    2: GGUFType("Q4_0", 32, 18, ((0, 8),)),
    3: GGUFType("Q4_1", 32, 20, ((0, 15), (2, 1))),
    6: GGUFType("Q5_0", 32, 22, ((0, 16),)),
    7: GGUFType("Q5_1", 32, 24, ((0, 31), (2, 1))),
    8: GGUFType("Q8_0", 32, 34, ((0, 128),)),
    9: GGUFType("Q8_1", 32, 40),
    10: GGUFType("Q2_K", 256, 84, ((80, 15 * 3), (82, 15))),
    11: GGUFType("Q3_K", 256, 110, ((108, 32 * 4),)),
    12: GGUFType("Q4_K", 256, 144, ((0, 63 * 15), (2, 63))),
    13: GGUFType("Q5_K", 256, 176, ((0, 63 * 31), (2, 63))),
    14: GGUFType("Q6_K", 256, 210, ((208, 128 * 32),)),
    15: GGUFType("Q8_K", 256, 292),
    16: GGUFType("IQ2_XXS", 256, 66),
    17: GGUFType("IQ2_XS", 256, 74),
    18: GGUFType("IQ3_XXS", 256, 98),
    19: GGUFType("IQ1_S", 256, 50),
    20: GGUFType("IQ4_NL", 32, 18, ((0, 127),)),
    21: GGUFType("IQ3_S", 256, 110),
    22: GGUFType("IQ2_S", 256, 82),
    23: GGUFType("IQ4_XS", 256, 136, ((0, 32 * 127),)),
    24: GGUFType("I8", 1, 1),
    25: GGUFType("I16", 1, 2),
    26: GGUFType("I32", 1, 4),
    27: GGUFType("I64", 1, 8),
    28: GGUFType("F64", 1, 8),
    29: GGUFType("IQ1_M", 256, 56),
    30: GGUFType("BF16", 1, 2),
    34: GGUFType("TQ1_0", 256, 54),
    35: GGUFType("TQ2_0", 256, 66),
    39: GGUFType("MXFP4", 32, 17),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}
# PowerInfer's ggml is older than the IQ types, whose numbers its whole numbers had.
POWERINFER_TYPES = {number: kind for number, kind in TYPES.items() if number < 16} | {
    16: BY_NAME["I8"],
    17: BY_NAME["I16"],
    18: BY_NAME["I32"],
}
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6  # types of tokens in a vocabulary; 1 is plain text
FLOATS = ("F32", "F16", "BF16")
SCALE = 2  # bytes of a block's scale
OURS: dict[str, Blocks] = {"Q8_0": "int8", "Q4_0": "int4"}
_TAKEN = {*OURS.items(), ("Q4_0", "int8")}
# What the gguf package widens: all but types that only activations have.
WIDENED = frozenset(kind.name for kind in TYPES.values() if kind.block > 1 and kind.name not in (*OURS, "Q8_1", "Q8_K"))


def row_bytes(kind: GGUFType, columns: int) -> int:
    """Bytes of a row of so many weights."""
    return columns // kind.block * kind.nbytes


def widener(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes f32 [n, columns] of rows uint8 [n, bytes] of the type `name`, which is one of blocks.

    Raises `InputError` where the gguf package is needed and missing, `ModelError` for a type that none can read.
    """
    if name in OURS:
        return _widen_q8_0 if name == "Q8_0" else _widen_q4_0
    if name not in WIDENED:
        raise ModelError(f"tensors of type {name} are not read; convert the model to another type")
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise InputError(f"tensors of type {name} need the gguf package: {_INSTALL}") from error
    kind = GGMLQuantizationType[name]
    return lambda rows: dequantize(rows, kind)


def scales(rows: np.ndarray, kind: GGUFType, at: int = 0) -> np.ndarray:
    """The f16 [n, blocks] that lie `at` so many bytes in each block of rows uint8 [n, bytes]; a view."""
    blocks = rows.reshape(len(rows), -1, kind.nbytes)
    return blocks[:, :, at : at + 2].view(np.float16)[:, :, 0]


def largest(rows: np.ndarray, kind: GGUFType) -> float:
    """What no weight of rows uint8 [n, bytes] is beyond; not finite where a scale is not. For types with `most`."""
    found = sum(np.abs(scales(rows, kind, at).astype(np.float32)) * np.float32(factor) for at, factor in kind.most)
    return float(np.max(found, initial=0))


def as_blocks(rows: np.ndarray, name: str, blocks: Blocks) -> np.ndarray | None:
    """Rows uint8 [n, bytes] of the type `name` as our rows of `blocks` that say the same numbers.

    Q8_0 is int8 and Q4_0 int4, code for code; Q4_0 is int8 too, of eight times the codes. None for other types, for the
    code -128, which Q8_0 can say and int8 cannot, and an eighth of a scale that f16 cannot. Raises `ValueError` for a
    scale that is no number.
    """
    if (name, blocks) not in _TAKEN:
        return None
    kind, layout = BY_NAME[name], LAYOUTS[blocks]
    n, count = len(rows), rows.shape[1] // kind.nbytes
    factors, codes = np.ascontiguousarray(scales(rows, kind)), _codes(rows, kind)
    if not np.isfinite(factors).all():
        raise ValueError("a scale is infinite or NaN")
    if name == "Q4_0" and blocks == "int8":
        codes, whole = _q4_0_codes(codes).astype(np.int8).view(np.uint8) << 3, factors
        factors = whole / np.float16(8)
        if not np.array_equal(factors * np.float16(8), whole):
            return None
    elif name == "Q8_0" and codes.view(np.int8).min() == -128:
        return None
    columns = count * BLOCK
    out = np.zeros((n, layout.row_bytes(columns)), np.uint8)
    at = layout.codes_bytes(columns)
    out[:, at : at + SCALE * count] = factors.view(np.uint8)
    if blocks == "int8":
        out[:, :columns] = codes.reshape(n, columns)
    else:
        out[:, :at] = _nibbles(codes, padded(columns) // BLOCK)
    return out.view(FORMATS[blocks].array)


def _codes(rows: np.ndarray, kind: GGUFType) -> np.ndarray:
    """The bytes of blocks without their scales, uint8 [n, blocks, bytes], copied; block by block, 4 times as fast."""
    size = kind.nbytes - SCALE
    block = np.dtype({"names": ["codes"], "formats": [f"V{size}"], "offsets": [SCALE], "itemsize": kind.nbytes})
    return np.ascontiguousarray(rows.view(block)["codes"]).view(np.uint8).reshape(len(rows), -1, size)


def _nibbles(codes: np.ndarray, blocks: int) -> np.ndarray:
    """Q4_0's bytes [n, count, 16] as ours, of so many blocks."""
    n, count = codes.shape[:2]
    wide = np.full((n, blocks, BLOCK), INT4_OFFSET, np.uint8)
    np.bitwise_and(codes, 15, out=wide[:, :count, : BLOCK // 2])
    np.right_shift(codes, 4, out=wide[:, :count, BLOCK // 2 :])
    four = wide.reshape(n, -1, GROUP // BLOCK, BLOCK)
    out = np.empty((n, four.shape[1], BLOCK, 2), np.uint8)
    np.bitwise_or(four[:, :, 0], four[:, :, 1] << 4, out=out[..., 0])
    np.bitwise_or(four[:, :, 2], four[:, :, 3] << 4, out=out[..., 1])
    return out.reshape(n, -1)


def _q4_0_codes(packed: np.ndarray) -> np.ndarray:
    """The codes f32 [n, blocks, 32] of Q4_0's bytes [n, blocks, 16]."""
    return np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.float32) - INT4_OFFSET


def _widen_q8_0(rows: np.ndarray) -> np.ndarray:
    kind = BY_NAME["Q8_0"]
    codes = _codes(rows, kind).view(np.int8).astype(np.float32)
    return _scaled(codes, scales(rows, kind))


def _widen_q4_0(rows: np.ndarray) -> np.ndarray:
    kind = BY_NAME["Q4_0"]
    codes = _q4_0_codes(_codes(rows, kind))
    return _scaled(codes, scales(rows, kind))


def _scaled(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    codes *= factors.astype(np.float32)[:, :, None]
    return codes.reshape(len(codes), -1)
