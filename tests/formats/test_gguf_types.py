"""Types of GGUF tensors: sizes and numbers as the gguf package has them, and Q8_0 and Q4_0 as rows of our blocks."""

import numpy as np
import pytest

from cpu_kernels.blocks import dequantize, store
from hybrid.errors import InputError, ModelError
from hybrid.formats.gguf_types import BY_NAME, OURS, TYPES, WIDENED, as_blocks, largest, row_bytes, widener

gguf = pytest.importorskip("gguf")
KIND = gguf.GGMLQuantizationType


def stored(name, shape=(5, 96), seed=0, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)
    return gguf.quants.quantize(values, KIND[name])


def random_rows(name, rows=3, blocks=4, seed=0):
    """Rows of random codes whose scales are small numbers."""
    kind = BY_NAME[name]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, kind.nbytes), np.uint8)
    for at, _ in kind.most:
        scale = np.random.default_rng(seed + 1).standard_normal((rows, blocks)).astype(np.float16)
        raw[:, :, at : at + 2] = scale.view(np.uint8).reshape(rows, blocks, 2)
    return raw.reshape(rows, -1)


def test_sizes_are_those_of_the_gguf_package():
    for number, kind in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[KIND(number)] == (kind.block, kind.nbytes) and KIND(number).name == kind.name


@pytest.mark.parametrize("name", OURS)
def test_our_own_types_are_widened_as_the_gguf_package_does(name):
    rows = stored(name)
    np.testing.assert_array_equal(widener(name)(rows), gguf.quants.dequantize(rows, KIND[name]))


def test_all_others_are_widened_by_it():
    for name in WIDENED:
        rows = np.zeros((2, row_bytes(BY_NAME[name], 256)), np.uint8)
        assert widener(name)(rows).shape == (2, 256)


@pytest.mark.parametrize("name", [kind.name for kind in TYPES.values() if kind.most])
def test_no_weight_is_beyond_what_the_scales_say(name):
    kind = BY_NAME[name]
    for seed in range(5):
        rows = random_rows(name, seed=seed)
        most = float(np.abs(gguf.quants.dequantize(rows, KIND[name])).max())
        assert 0 < most <= largest(rows, kind) * (1 + 1e-6) <= 400 * most
        at = kind.most[-1][0]
        rows[1, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)
        assert not np.isfinite(largest(rows, kind))


@pytest.mark.parametrize(("name", "blocks"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_0", "int8")])
@pytest.mark.parametrize("columns", [32, 96, 128, 160])
def test_blocks_are_taken_over_to_the_bit(name, blocks, columns):
    rows = stored(name, (5, columns))
    found = as_blocks(rows, name, blocks)
    np.testing.assert_array_equal(dequantize(found, columns), gguf.quants.dequantize(rows, KIND[name]))
    codes = rows.reshape(5, -1, BY_NAME[name].nbytes)
    scales = np.zeros((5, -(-columns // 128) * 4), np.float16)
    scales[:, : columns // 32] = codes[:, :, :2].copy().view(np.float16)[:, :, 0]
    wide = np.zeros((5, scales.shape[1] * 32), np.float32)
    step = np.repeat(scales.astype(np.float32), 32, axis=1)[:, :columns]
    wide[:, :columns] = np.rint(gguf.quants.dequantize(rows, KIND[name]) / step)
    same = (wide * 8, scales / 8) if (name, blocks) == ("Q4_0", "int8") else (wide, scales)
    np.testing.assert_array_equal(found, store(*same, blocks))


def test_what_our_blocks_cannot_say_is_not_taken():
    rows = stored("Q8_0")
    rows[2, 2 + 5] = 0x80  # the code -128
    assert as_blocks(rows, "Q8_0", "int8") is None
    assert as_blocks(stored("Q4_0"), "Q4_0", "int8") is not None
    assert as_blocks(stored("Q4_0", scale=1e-6), "Q4_0", "int8") is None  # an eighth of a scale is below f16
    assert as_blocks(stored("Q8_0"), "Q8_0", "int4") is None


@pytest.mark.parametrize("name", OURS)
def test_a_scale_that_is_no_number_is_refused(name):
    rows = stored(name)
    rows[1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="scale is infinite or NaN"):
        as_blocks(rows, name, OURS[name])


def test_types_that_none_reads_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ModelError, match="type I32 are not read; convert"):
        widener("I32")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"type Q6_K need the gguf package: pip install hybrid-inference\[gguf\]"):
        widener("Q6_K")
    assert widener("Q8_0") is not None
