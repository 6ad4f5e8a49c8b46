"""int8 and int4 weights in blocks of 32 along the input dimension, one f16 scale a block, symmetric.

A row is one run of bytes, codes first, then the scales, so that reading a neuron is one jump. Rows are padded with
zeros to P = `padded(d)`, a multiple of 128. With q the codes and s the scales, w[j] = q[j] * s[j // 32]:

    int8   P bytes q, -127 to 127, in order; P / 32 scales                               array int8  [n, P + P / 16]
    int4   P / 2 bytes q + 8, 0 to 15; P / 32 scales                                     array uint8 [n, P / 2 + P / 16]
           128 codes are 32 little-endian uint16: bits 4k to 4k + 3 of number j hold code 32 k + j, so that a mask
           gives the 16-bit lanes of one block, and no lane has to move

32 to a block and one f16 scale is the format that llama.cpp's Q8_0 and Q4_0 made common: 6% of int8's bytes. Blocks of
64 would save half of that and lose more in int4. The scale of a block is the best of a few candidates by squared error
rather than the largest weight over 127 or 8: one is a power of two, which makes weights on such a grid exact.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from numba.extending import register_jitable

Blocks = Literal["int8", "int4"]

BLOCK = 32
GROUP = 128
LARGEST = {"int8": 127, "int4": 7}
LEAST = {"int8": -127, "int4": -8}
_OFFSET = 8  # int4 codes are stored with it added
ARRAY_TYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}
# Scales tried for a block, as shares of the largest weight over the largest code.
_TRIED = {"int8": np.array([1.0], np.float32), "int4": np.linspace(0.76, 1.12, 13, dtype=np.float32)}


@register_jitable
def padded(d: int) -> int:
    """Codes of a row of `d` weights."""
    return -(-d // GROUP) * GROUP


def row_bytes(kind: Blocks, d: int) -> int:
    """Bytes of a row of `d` weights."""
    return padded(d) // (1 if kind == "int8" else 2) + padded(d) // 16


@njit(nogil=True, cache=True)
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
    scales = np.zeros((len(wide), wide.shape[1] // BLOCK), np.float32)
    _best_scales(wide, _TRIED[kind], np.float32(LEAST[kind]), np.float32(LARGEST[kind]), scales)
    return scales.astype(np.float16)


def codes_of(wide: np.ndarray, scales: np.ndarray, kind: Blocks) -> np.ndarray:
    """The nearest codes of wide [n, 32 k] f32 for scales f16 [n, k], as f32 [n, 32 k]."""
    step = scales.astype(np.float32)[:, :, None]
    blocks = wide.reshape(len(wide), wide.shape[1] // BLOCK, BLOCK)
    codes = np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0).round()
    return codes.clip(LEAST[kind], LARGEST[kind]).reshape(wide.shape)


def store(codes: np.ndarray, scales: np.ndarray, kind: Blocks) -> np.ndarray:
    """Rows of `kind` from codes f32 [n, P] and scales f16 [n, P / 32]."""
    n = len(codes)
    stored = codes.astype(np.int8) if kind == "int8" else _as_nibbles(codes)
    parts = [stored.view(np.uint8).reshape(n, -1), scales.view(np.uint8).reshape(n, -1)]
    return np.concatenate(parts, axis=1).view(ARRAY_TYPES[kind])


def dequantize(rows: np.ndarray, d: int) -> np.ndarray:
    """The weights f32 [n, d] of rows as `quantize` makes them; int8 and int4 are told apart by the array's type."""
    kind: Blocks = "int8" if rows.dtype == np.int8 else "int4"
    n, width = len(rows), padded(d)
    codes_bytes = row_bytes(kind, d) - width // 16
    raw = np.ascontiguousarray(rows).view(np.uint8)
    scales = np.ascontiguousarray(raw[:, codes_bytes:]).view(np.float16).astype(np.float32)
    stored = np.ascontiguousarray(raw[:, :codes_bytes])
    codes = stored.view(np.int8).astype(np.float32) if kind == "int8" else _from_nibbles(stored)
    return (codes.reshape(n, width // BLOCK, BLOCK) * scales[:, :, None]).reshape(n, width)[:, :d]


def _as_nibbles(codes: np.ndarray) -> np.ndarray:
    four = (codes + _OFFSET).astype(np.uint16).reshape(len(codes), -1, 4, BLOCK)
    return four[:, :, 0] | four[:, :, 1] << 4 | four[:, :, 2] << 8 | four[:, :, 3] << 12


def _from_nibbles(stored: np.ndarray) -> np.ndarray:
    words = stored.view(np.uint16).reshape(len(stored), -1, 1, BLOCK)
    shifts = np.arange(0, 16, 4, dtype=np.uint16)[None, None, :, None]
    return (((words >> shifts) & 15).astype(np.float32) - _OFFSET).reshape(len(stored), -1)
