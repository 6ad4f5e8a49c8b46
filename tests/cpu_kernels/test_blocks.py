"""int8 and int4 blocks: round trips within their bounds, exact grids, extremes, padding, what is refused."""

import numpy as np
import pytest

from cpu_kernels.blocks import FORMATS, dequantize, padded, quantize
from cpu_kernels.contract import BLOCK, LAYOUTS

KINDS = ("int8", "int4")
SHAPES = [(1, 1), (3, 17), (65, 17), (5, 33), (30, 384), (12, 1023), (7, 4095)]


def normal(n, d, seed=0):
    return np.random.default_rng([n, d, seed]).standard_normal((n, d)).astype(np.float32)


def blocks_of(weight):
    """weight [n, d] in blocks, f64 [n, blocks, 32], padded with zeros."""
    wide = np.zeros((len(weight), padded(weight.shape[1])))
    wide[:, : weight.shape[1]] = weight
    return wide.reshape(len(weight), -1, BLOCK)


def scales_of(rows, d):
    """Their sizes: a scale is negative where the largest weight is the positive end of a range that reaches lower."""
    raw = np.ascontiguousarray(rows).view(np.uint8)
    return np.abs(np.ascontiguousarray(raw[:, -(padded(d) // 16) :]).view(np.float16).astype(np.float64))


def round_trip(weight, kind):
    return dequantize(quantize(weight, kind), weight.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rows_are_stored_as_documented(n, d, kind):
    weight = normal(n, d)
    rows = quantize(weight, kind)
    assert rows.dtype == FORMATS[kind].array and rows.shape == (n, LAYOUTS[kind].row_bytes(d))
    assert LAYOUTS[kind].row_bytes(d) == padded(d) * {"int8": 34, "int4": 18}[kind] // 32
    back = dequantize(rows, d)
    assert back.shape == (n, d) and back.dtype == np.float32
    assert (dequantize(rows, padded(d))[:, d:] == 0).all()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_int8_errs_by_half_a_scale_at_most(n, d):
    weight = normal(n, d)
    scales = scales_of(quantize(weight, "int8"), d)
    top = np.abs(blocks_of(weight)).max(-1)
    # f16 keeps 11 bits of a scale; a power of two may be up to twice the least scale, where it errs less.
    assert (scales <= 2 * top / FORMATS["int8"].largest * (1 + 2**-11)).all()
    assert (np.abs(blocks_of(round_trip(weight, "int8")) - blocks_of(weight)) <= 0.5001 * scales[..., None]).all()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_int4_errs_less_by_block_than_the_plain_scale(n, d):
    """The scale of the largest weight over 7, the largest at -8, and the power of two are all beaten or met."""
    weight = normal(n, d)
    blocks = blocks_of(weight)
    error = ((blocks_of(round_trip(weight, "int4")) - blocks) ** 2).sum(-1)
    at = np.abs(blocks).argmax(-1)[..., None]
    top = np.take_along_axis(blocks, at, -1)
    used = np.where(top == 0, 1, top)
    for step in (np.abs(used) / 7, used / -8, 2.0 ** np.ceil(np.log2(np.abs(used) / 7))):
        step = step.astype(np.float16).astype(np.float64)
        plain = ((np.clip(np.round(blocks / step), -8, 7) * step - blocks) ** 2).sum(-1)
        assert (error <= plain * (1 + 1e-5) + 1e-12).all()


def test_mean_error_of_normal_weights():
    weight = normal(64, 1024)
    for kind, bound in (("int8", 0.007), ("int4", 0.09)):
        assert np.sqrt(np.mean((round_trip(weight, kind) - weight) ** 2)) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-14, -7, 0, 9])
def test_power_of_two_grids_are_exact(exponent, kind):
    rng = np.random.default_rng(exponent + 99)
    weight = rng.integers(-FORMATS[kind].largest, FORMATS[kind].largest + 1, (20, 200)).astype(np.float32)
    weight[:, ::BLOCK] = FORMATS[kind].largest
    weight = weight * np.float32(2.0**exponent)
    assert (round_trip(weight, kind) == weight).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_a_lone_weight(kind):
    weight = np.zeros((3, 100), np.float32)
    assert (round_trip(weight, kind) == 0).all()
    weight[1, 70], weight[2, 99] = 0.3, -0.3
    back = round_trip(weight, kind)
    assert (back[weight == 0] == 0).all()
    np.testing.assert_allclose(back[weight != 0], weight[weight != 0], rtol=2**-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_weights_that_are_taken(kind):
    weight = normal(4, 64)
    weight *= 65504 / np.abs(weight).max()
    back = round_trip(weight, kind)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, weight, atol={"int8": 0.5, "int4": 0.7}[kind] * 65504 / FORMATS[kind].largest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-12, 1e-38])
def test_tiny_weights_err_by_what_a_tiny_scale_can_say(size, kind):
    """Below 2^-14 a scale is off by up to 2^-25, and so is each weight by its code times that; below 2^-25 it is 0.

    The least scale that is tried for int4 is 0.76 of the largest weight over 7, which then lies 2.2 scales beyond 7.
    """
    weight = normal(8, 64) * np.float32(size)
    error = np.abs(round_trip(weight, kind) - weight)
    scales = scales_of(quantize(weight, kind), 64).repeat(BLOCK, 1)[:, :64]
    beyond, reach = {"int8": (0.51, 128), "int4": (2.25, 7 / 0.76 + 1)}[kind]
    assert (error <= beyond * scales + reach * 2.0**-25).all()


def test_an_int8_row_by_hand():
    """Two blocks in use of the four of a group: scale 1/4 and, where the largest is 254, scale 2."""
    weight = np.zeros((1, 34), np.float32)
    weight[0, [0, 1, 31]] = 31.75, -0.25, 16.0
    weight[0, [32, 33]] = -254, 4
    rows = quantize(weight, "int8")
    assert rows.shape == (1, 128 + 8)
    codes = np.zeros(128, np.int8)
    codes[[0, 1, 31, 32, 33]] = 127, -1, 64, -127, 2
    assert rows[0, :128].tolist() == codes.tolist()
    assert rows[0, 128:].view(np.float16).tolist() == [0.25, 2.0, 0.0, 0.0]
    assert (dequantize(rows, 34) == weight).all()


def test_an_int4_row_by_hand():
    """Bits 4k to 4k + 3 of 16-bit word j hold code 32 k + j, plus 8."""
    weight = np.zeros((1, 128), np.float32)
    weight[0, [0, 1, 32, 64, 96, 127]] = 7, -3, 14, 1.75, 3.5, -0.5
    rows = quantize(weight, "int4")
    assert rows.shape == (1, 64 + 8)
    words = np.full(32, 0x8888, np.uint16)
    words[0] = (8 + 7) | (8 + 7) << 4 | (8 + 7) << 8 | (8 + 7) << 12
    words[1] = 0x8880 | (8 - 3)
    words[31] = 0x0888 | (8 - 1) << 12
    assert rows[0, :64].view(np.uint16).tolist() == words.tolist()
    assert rows[0, 64:].view(np.float16).tolist() == [1.0, 2.0, 0.25, 0.5]
    assert (dequantize(rows, 128) == weight).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65505, -1e30])
def test_what_f16_cannot_hold_is_refused(bad, kind):
    weight = normal(2, 40)
    weight[1, 33] = bad
    with pytest.raises(ValueError, match="finite and at most 65504"):
        quantize(weight, kind)
