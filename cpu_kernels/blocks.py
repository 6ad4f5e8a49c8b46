"""int8 and int4 weights in blocks of 32 along the input dimension, one f16 scale a block, symmetric: see `contract.py`.

    int8   array int8  [n, P + P / 16]            int4   array uint8 [n, P / 2 + P / 16]

32 to a block and one f16 scale is the format that llama.cpp's Q8_0 and Q4_0 made common: 6% of int8's bytes. Blocks of
64 would save half of that and lose more in int4. The scale of a block is the best of a few candidates by squared error
rather than the largest weight over 127 or 8: one is a power of two, which makes weights on such a grid exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit
from numba.extending import register_jitable

from cpu_kernels import contract
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import BLOCK, GROUP, INT4_OFFSET, LAYOUTS, Blocks, RowLayout

padded = register_jitable(contract.padded)


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """How weights become codes and codes bytes.

    array: the type of the rows' array. least, largest: codes. tried: scales tried for a block, as shares of the largest
    weight over the largest code; of several the best may leave that weight beyond the codes. packed: the bytes of codes
    f32 [n, P]; unpacked: the codes again, f32 [n, P].
    """

    layout: RowLayout
    array: np.dtype
    least: int
    largest: int
    tried: np.ndarray
    packed: Callable[[np.ndarray], np.ndarray]
    unpacked: Callable[[np.ndarray], np.ndarray]


def _as_nibbles(codes: np.ndarray) -> np.ndarray:
    four = (codes + INT4_OFFSET).astype(np.uint16).reshape(len(codes), -1, GROUP // BLOCK, BLOCK)
    return four[:, :, 0] | four[:, :, 1] << 4 | four[:, :, 2] << 8 | four[:, :, 3] << 12


def _from_nibbles(stored: np.ndarray) -> np.ndarray:
    words = stored.view(np.uint16).reshape(len(stored), -1, 1, BLOCK)
    shifts = np.arange(0, 16, 4, dtype=np.uint16)[None, None, :, None]
    return (((words >> shifts) & 15).astype(np.float32) - INT4_OFFSET).reshape(len(stored), -1)


FORMATS: dict[str, BlockFormat] = {
    "int8": BlockFormat(
        *(LAYOUTS["int8"], np.dtype(np.int8), -127, 127, np.array([1.0], np.float32)),
        packed=lambda codes: codes.astype(np.int8),
        unpacked=lambda stored: stored.view(np.int8).astype(np.float32),
    ),
    "int4": BlockFormat(
        *(LAYOUTS["int4"], np.dtype(np.uint8), -8, 7, np.linspace(0.76, 1.12, 13, dtype=np.float32)),
        packed=_as_nibbles,
        unpacked=_from_nibbles,
    ),
}


def format_of(rows: np.ndarray) -> BlockFormat:
    """The format of rows in blocks, which their array's type tells. Raises `ValueError` for other arrays."""
    for found in FORMATS.values():
        if found.array == rows.dtype:
            return found
    raise ValueError(f"rows in blocks are arrays of {[str(f.array) for f in FORMATS.values()]}, got {rows.dtype}")


@kernel
def _best_scales(weight, tried, low, high, scales):  # type: ignore[no-untyped-def]
    """scales[i, b]: of the candidates, the one that rounds block b of row i with the least squared error."""
    for i in range(weight.shape[0]):
        for b in range(scales.shape[1]):
            block = weight[i, 32 * b : min(32 * b + 32, weight.shape[1])]
            top, signed = np.float32(0), np.float32(0)
            for w in block:
                if abs(w) > top:
                    top, signed = abs(w), w
            best, chosen = np.float32(np.inf), np.float32(0)
            for c in range(tried.shape[0] + 2):
                if top == 0:
                    break
                if c == 0:  # the power of two that just holds the largest
                    scale = np.float32(2.0 ** np.ceil(np.log2(top / high)))
                elif c == 1:  # the largest weight at the end of the range that reaches further
                    scale = signed / low
                else:
                    scale = tried[c - 2] * top / high
                scale = _as_f16(scale)
                if scale == 0:
                    continue
                error = np.float32(0)
                for w in block:
                    q = min(max(np.rint(w / scale), low), high)
                    error += (w - q * scale) * (w - q * scale)
                if error < best:
                    best, chosen = error, scale
            scales[i, b] = chosen


@njit(nogil=True, inline="always")
def _as_f16(x):  # type: ignore[no-untyped-def]
    """x with the 11 significant bits that a normal f16 keeps; the launcher rounds what is left exactly."""
    bits = np.float32(x).view(np.int32)
    return np.int32((bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) & np.int32(-8192)).view(
        np.float32
    )


def quantize(weight: np.ndarray, kind: Blocks) -> np.ndarray:
    """Rows of `kind` for weight [n, d] f32; raises `ValueError` for weights that are not finite or too large for f16.

    The error of a weight is at most half a scale (int8), or what the least squared error of its block allows (int4).
    """
    wide = widened(weight)
    scales = choose_scales(wide, kind)
    return store(codes_of(wide, scales, kind), scales, kind)


def widened(weight: np.ndarray) -> np.ndarray:
    """A copy of weight [n, d] f32 with rows padded to [n, P]; raises `ValueError` as `quantize` does."""
    n, d = weight.shape
    if not np.isfinite(weight).all() or np.abs(weight).max(initial=0) > 65504:
        raise ValueError("weights must be finite and at most 65504 to be stored in blocks")
    wide = np.zeros((n, padded(d)), np.float32)
    wide[:, :d] = weight
    return wide


def choose_scales(wide: np.ndarray, kind: Blocks) -> np.ndarray:
    """f16 [n, k] scales of wide [n, 32 k] f32, C-contiguous."""
    scales, form = np.zeros((len(wide), wide.shape[1] // BLOCK), np.float32), FORMATS[kind]
    _best_scales(wide, form.tried, np.float32(form.least), np.float32(form.largest), scales)
    return scales.astype(np.float16)


def codes_of(wide: np.ndarray, scales: np.ndarray, kind: Blocks) -> np.ndarray:
    """The nearest codes of wide [n, 32 k] f32 for scales f16 [n, k], as f32 [n, 32 k]."""
    step = scales.astype(np.float32)[:, :, None]
    blocks = wide.reshape(len(wide), wide.shape[1] // BLOCK, BLOCK)
    codes = np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0).round()
    return codes.clip(FORMATS[kind].least, FORMATS[kind].largest).reshape(wide.shape)


def store(codes: np.ndarray, scales: np.ndarray, kind: Blocks) -> np.ndarray:
    """Rows of `kind` from codes f32 [n, P] and scales f16 [n, P / 32]."""
    n, form = len(codes), FORMATS[kind]
    parts = [form.packed(codes).view(np.uint8).reshape(n, -1), scales.view(np.uint8).reshape(n, -1)]
    return np.concatenate(parts, axis=1).view(form.array)


def dequantize(rows: np.ndarray, d: int) -> np.ndarray:
    """The weights f32 [n, d] of rows as `quantize` makes them. Raises `ValueError` for arrays of another type."""
    n, width, form = len(rows), padded(d), format_of(rows)
    codes_bytes = form.layout.codes_bytes(d)
    raw = np.ascontiguousarray(rows).view(np.uint8)
    scales = np.ascontiguousarray(raw[:, codes_bytes:]).view(np.float16).astype(np.float32)
    codes = form.unpacked(np.ascontiguousarray(raw[:, :codes_bytes]))
    return (codes.reshape(n, width // BLOCK, BLOCK) * scales[:, :, None]).reshape(n, width)[:, :d]
