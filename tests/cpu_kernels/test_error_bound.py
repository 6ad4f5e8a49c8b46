"""No product of a row and its copy differs by more than is stored of the copy's error."""

import numpy as np
import pytest

from cpu_kernels.blocks import dequantize
from cpu_kernels.contract import LAYOUTS
from cpu_kernels.error_bound import bounded_copy, error_bounds_ref


def scales_of(rows: np.ndarray, d: int) -> np.ndarray:
    return np.ascontiguousarray(rows[:, LAYOUTS["int8"].codes_bytes(d) :]).view(np.float16).astype(np.float64)


def norms_of(x: np.ndarray, blocks: int) -> np.ndarray:
    wide = np.zeros(32 * blocks)
    wide[: len(x)] = x
    return np.linalg.norm(wide.reshape(blocks, 2, 16), axis=2).sum(1)


@pytest.mark.parametrize("d", [1, 17, 32, 129, 2048])
def test_no_input_goes_beyond_the_bound(d):
    """Inputs along the error of a row, or of one half of it, and random ones; products in f64."""
    random = np.random.default_rng(d)
    weight = (random.standard_normal((24, d)) * 10.0 ** random.integers(-9, 3, (24, 1))).astype(np.float32)
    weight[3], weight[4, : d // 2], weight[5] = 0, 0, weight[5] * 1e-12
    rows, slope, rest = bounded_copy(weight)
    scales, copy = scales_of(rows, d), dequantize(rows, d).astype(np.float64)
    assert (scales >= 0).all() and np.isfinite(slope).all() and (rest > 0).all()
    error = weight - copy
    for i in range(len(weight)):
        halves = [np.where(np.arange(d) // 16 == h, error[i], 0) for h in range(0, -(-d // 16), 7)]
        for x in (error[i], *halves, random.standard_normal(d)):
            bound = slope[i] * (scales[i] * norms_of(x, scales.shape[1])).sum() + rest[i] * np.linalg.norm(x)
            assert abs(error[i] @ x) <= bound


def test_bounds_are_close_to_the_least_that_hold():
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, 512)).astype(np.float32)
    rows, slope, rest = bounded_copy(weight)
    least = error_bounds_ref(weight, rows, slope)
    assert (rest >= least).all() and (rest <= 1.02 * least).all()
    # An error of half a step at most, in halves of 16: sqrt(16 / 12) of a step on the mean, and the input's rounding.
    assert ((slope > 1.0) & (slope < 1.7)).all()


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(ValueError, match="finite"):
        bounded_copy(np.full((2, 40), np.inf, np.float32))
    with pytest.raises(ValueError, match="262145 weights"):
        bounded_copy(np.zeros((1, 2**18 + 1), np.float32))
