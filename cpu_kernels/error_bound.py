"""How far a row's copy in blocks of int8 can be from the row itself, in any product: two numbers a row.

With w a row, q its copy, s[b] the scales of q's blocks of 32, and x any input, whose halves h of blocks have the norms
|x_h|, n[b] = |x_2b| + |x_2b+1|:

    | w . x  -  q . x' |  <=  slope * sum over b of s[b] n[b]  +  rest * |x|

where w . x is what the kernels of either device compute for a row of floats, in f32 and in any order, and q . x' what
they compute for a row of int8, on the CPU of x' = x in 16 bits (`inputs.py`).

Proof. (1) (w - q) . x <= sum over h of |e_h| |x_h|, e = w - q (Cauchy-Schwarz in each half). (2) An element of x' is
within 0.51 of a step of 16 bits of x's, a step is the block's largest element over 32767, and that is at most n[b]; so
q . (x - x') <= sum over b of k[b] n[b], k[b] = 2.05 / 32767 (|q_2b| + |q_2b+1|): four times 0.51, as a half has 16
elements. (3) Both together are at most the sum over h of E_h |x_h|, E_h = |e_h| + k[b]. For any slope, E_h is at most
slope * s[b] + r_h, r_h = max(0, E_h - slope * s[b]), and the sum of r_h |x_h| is at most |r| |x|. (4) A sum of products
in f32, in any order, fused or not, on tensor cores too, is within g * |w| |x| of the true one, g = (d + 64) / 2^23, for
w and for q, of which |x'| <= 1.01 |x|; rest = |r| + g (|w| + 1.01 |q|). (5) All is taken 2^-9 larger: the sums of
positive numbers, square roots and roundings by which the right side is computed lose less than that up to d = 2^18.
Numbers that are too small for f32 are in `LEAST_REST`, and in what `certificate.py` adds to every norm and bound.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.blocks import choose_scales, codes_of, dequantize, store, widened
from cpu_kernels.compiled import kernel
from cpu_kernels.contract import BLOCK, LAYOUTS

HALF = 16  # elements whose norms are taken together
LEAST_REST = 1e-30
_MARGIN = 1 + 2.0**-9
_STEP = 2.05 / 32767
_ROUNDING = 2.0**-23
_MOST_COLUMNS = 2**18
# Slopes tried for a row, in deviations of E_h / s from their mean: what is beyond one joins the rest.
_TRIED = (0.0, 1.0, 2.0, 4.0)


@kernel
def _bounds(weight, codes, scales, d, tried, errors, slope, rest):  # type: ignore[no-untyped-def]
    halves = 2 * scales.shape[1]
    for i in range(weight.shape[0]):
        lengths = weights = total = first = second = 0.0
        for b in range(scales.shape[1]):
            norms = 0.0
            for h in range(2 * b, 2 * b + 2):
                error = square = 0.0
                for j in range(HALF * h, HALF * h + HALF):
                    w, q = np.float64(weight[i, j]), np.float64(codes[i, j]) * np.float64(scales[i, b])
                    error += (w - q) * (w - q)
                    square += q * q
                    weights += w * w
                lengths += square
                norms += np.sqrt(square)
                errors[h] = np.sqrt(error)
            total += scales[i, b]
            for h in range(2 * b, 2 * b + 2):
                errors[h] += _STEP * norms
                ratio = errors[h] / scales[i, b] if scales[i, b] > 0 else 0.0
                first += ratio / halves
                second += ratio * ratio / halves
        deviation, best = np.sqrt(max(0.0, second - first * first)), np.inf
        for number in range(tried.shape[0]):
            ratio, left = max(0.0, first + tried[number] * deviation), 0.0
            for h in range(halves):
                beyond = max(0.0, errors[h] - ratio * scales[i, h // 2])
                left += beyond * beyond
            # Where every half of x has a norm of 1.
            cost = 2 * ratio * total + np.sqrt(halves * left)
            if cost < best:
                best, slope[i], rest[i] = cost, np.float32(ratio * _MARGIN), np.float32(np.sqrt(left) * _MARGIN)
        rounding = _ROUNDING * (d + 64) * (np.sqrt(weights) + 1.01 * np.sqrt(lengths))
        rest[i] = max(LEAST_REST, (np.float64(rest[i]) + rounding) * _MARGIN)


def bounded_copy(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in blocks of int8 of weight [n, d] f32, whose scales are not below 0, and f32 [n] slope and rest of their
    error; see the module.

    Raises `ValueError` for weights that `quantize` refuses, and for rows longer than the proof holds.
    """
    n, d = weight.shape
    if d > _MOST_COLUMNS:
        raise ValueError(f"rows have {d} weights, a copy's error is bounded for up to {_MOST_COLUMNS}")
    wide = widened(weight)
    scales = np.abs(choose_scales(wide, "int8"))  # codes go as far below 0 as above
    codes = codes_of(wide, scales, "int8")
    slope, rest = np.zeros(n, np.float32), np.zeros(n, np.float32)
    steps, errors = scales.astype(np.float32), np.zeros(wide.shape[1] // HALF)
    _bounds(wide, codes, steps, d, np.array(_TRIED), errors, slope, rest)
    return store(codes, scales, "int8"), slope, rest


def error_bounds_ref(weight: np.ndarray, rows: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The least rest, f64 [n], that may stand beside `slope`, in NumPy, without the margins of the module."""
    n, d = weight.shape
    blocks = -(-d // BLOCK)
    scales = np.ascontiguousarray(rows[:, LAYOUTS["int8"].codes_bytes(d) :]).view(np.float16).astype(np.float64)
    pad = ((0, 0), (0, blocks * BLOCK - d))
    w, q = (np.pad(part.astype(np.float64), pad).reshape(n, blocks, 2, HALF) for part in (weight, dequantize(rows, d)))
    errors = np.linalg.norm(w - q, axis=3) + _STEP * np.linalg.norm(q, axis=3).sum(2, keepdims=True)
    beyond = np.maximum(0, errors - slope.astype(np.float64)[:, None, None] * scales[:, :blocks, None])
    lengths = [np.sqrt((part * part).sum((1, 2, 3))) for part in (w, q)]
    rounding = _ROUNDING * (d + 64) * sum(lengths)
    return np.sqrt((beyond**2).sum((1, 2))) + rounding
