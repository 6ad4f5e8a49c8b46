"""RoPE, QK norm and the write into the KV cache: against the reference and torch."""

import numpy as np
import pytest
import torch
from matrix_cases import rounded_codes

from cpu_kernels.rope import QKNorm, rope, rope_heads, rope_ref
from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.transformer import Norm

EPS, BLOCK_SIZE = 1e-6, 4
NONE = np.empty(0, np.float32)


def make(heads, kv_heads, head_dim, rotated=True, normed=False, dtype=np.float32):
    """The arguments of `rope` up to the position; the sequence's blocks are not in the cache's order."""
    rng = np.random.default_rng(heads * head_dim + kv_heads)
    qkv = rng.standard_normal((heads + 2 * kv_heads, head_dim)).astype(np.float32)
    angles = rng.uniform(-7, 7, head_dim // 2)
    rotation = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if rotated else (NONE, NONE)
    norms = rng.standard_normal((4, head_dim)).astype(np.float32)
    norm = QKNorm(norms[0], norms[1], EPS) if normed else QKNorm(NONE, NONE, EPS)
    if normed == "layer":
        norm = norm._replace(q_bias=norms[2], k_bias=norms[3])
    cache = np.full((5, 2, kv_heads, BLOCK_SIZE, head_dim), np.nan, dtype)
    return qkv, rotation, norm, cache, np.array([3, 0, 4], np.int32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (17, 1), (8, 8)])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normed", ["layer", True, False])
def test_matches_reference(heads, kv_heads, head_dim, rotated, normed):
    ours, truth = (make(heads, kv_heads, head_dim, rotated, normed) for _ in range(2))
    for position in (0, 3, 4, 11):
        rope(*ours, position, WorkerPool(1))
        rope_ref(*truth, position, None)
        np.testing.assert_allclose(ours[0], truth[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours[3], truth[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", ["layer", True, False])
def test_is_rotate_half_after_torchs_norm(normed):
    args = make(6, 2, 10, normed=normed)
    heads, (cos, sin), (q_norm, k_norm, _, q_bias, k_bias) = torch.from_numpy(args[0].copy()), args[1], args[2]
    q, k, v = heads.split([6, 2, 2])
    if normed:
        q, k = (
            Norm(torch.from_numpy(weight), torch.from_numpy(bias) if bias.size else None, EPS)(x, WorkerPool(1))
            for weight, bias, x in ((q_norm, q_bias, q), (k_norm, k_bias, k))
        )
    cos, sin = (torch.from_numpy(np.tile(angle, 2)) for angle in (cos, sin))
    turned_q, turned_k = (x * cos + torch.cat((-x[:, 5:], x[:, :5]), 1) * sin for x in (q, k))
    rope(*args, 6, WorkerPool(1))
    np.testing.assert_allclose(args[0][:6], turned_q, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(args[3][0, 0, :, 2], turned_k, rtol=1e-5, atol=1e-6)
    assert (args[3][0, 1, :, 2] == v.numpy()).all()


def test_odd_heads_without_rotation_and_one_place_written():
    args = make(3, 1, 17, rotated=False)
    qkv, cache = args[0].copy(), args[3]
    rope(*args, 9, WorkerPool(1))
    assert (args[0] == qkv).all()
    assert (cache[4, :, :, 1] == qkv[3:].reshape(2, 1, 17)).all()
    assert np.isfinite(cache).sum() == 2 * 17


def test_f16_keys_match_the_f32_ones_rounded():
    exact, rounded = (make(6, 2, 10, normed=True, dtype=dtype) for dtype in (np.float32, np.float16))
    for args in (exact, rounded):
        rope(*args, 6, WorkerPool(1))
    np.testing.assert_array_equal(rounded[3], exact[3].astype(np.float16))


def test_rounding_to_f16_matches_numpys():
    """Every f16, what lies half-way between two and beside it, and what is beyond the largest."""
    numbers = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = (numbers[1:] + numbers[:-1]) / 2
    beyond = np.array([65519, 65520, 1e5, np.inf], np.float32)
    values = np.concatenate([numbers, halves, np.nextafter(halves, 0), np.nextafter(halves, np.float32(1e9)), beyond])
    values = np.concatenate([values, -values, [np.nan, 0]]).astype(np.float32)
    qkv, rotation, norm, cache, table = make(1, 1, len(values), rotated=False, dtype=np.float16)
    qkv[2] = values
    rope(qkv, rotation, norm, cache, table, 0, WorkerPool(1))
    expected = values.clip(-65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(cache[3, 1, 0, 0].view(np.int16)[:-2], expected.view(np.int16)[:-2])
    np.testing.assert_array_equal(cache[3, 1, 0, 0, -2:], expected[-2:])


def test_same_bits_for_any_number_of_workers():
    pool, answers = WorkerPool(7), []
    for workers in (1, 2, 3, 7):
        args = make(5, 1, 64, normed=True)
        pool.run(rope_heads, workers, *args[:2], tuple(args[2]), args[3], None, args[4], 5)
        answers.append(np.concatenate([args[0].ravel(), args[3].ravel()]))
    pool.close()
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_misfits_are_refused():
    qkv, rotation, norm, cache, table = make(2, 1, 10)
    pool = WorkerPool(1)
    for bad in (
        (qkv[:2], rotation, norm, cache, table),
        (qkv[:, :8].copy(), rotation, norm, cache, table),
        (qkv, (rotation[0], rotation[1][:4]), norm, cache, table),
        (qkv, rotation, QKNorm(NONE, np.ones(10, np.float32), EPS), cache, table),
        (qkv, rotation, QKNorm(*np.ones((2, 10), np.float32), EPS, NONE, np.ones(10, np.float32)), cache, table),
        (qkv, rotation, norm, cache[:, :1].copy(), table),
    ):
        with pytest.raises(ValueError, match="rope shapes do not fit"):
            rope(*bad, 0, pool)
    with pytest.raises(ValueError, match="f32"):
        rope(qkv.astype(np.float64), rotation, norm, cache, table, 0, pool)
    with pytest.raises(ValueError, match="int32 block table"):
        rope(qkv, rotation, norm, cache, table.astype(np.int64), 0, pool)
    with pytest.raises(ValueError, match="shapes do not fit"):
        odd = make(2, 1, 17)
        rope(*odd, 0, pool)
    for position, ids in ((-1, table), (12, table), (0, table + np.int32(2)), (0, table - np.int32(4))):
        with pytest.raises(ValueError, match=f"position {position} has no place"):
            rope(qkv, rotation, norm, cache, ids, position, pool)


def make_int8(heads, kv_heads, head_dim, **options):
    """As `make`, and scales."""
    *args, _, table = make(heads, kv_heads, head_dim, **options)
    cache = np.full((5, 2, kv_heads, BLOCK_SIZE, head_dim), 99, np.int8)
    return *args, cache, table, np.full((5, 2, kv_heads, BLOCK_SIZE), np.nan, np.float32)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (4, 2, 10), (17, 1, 64)])
def test_int8_matches_reference(heads, kv_heads, head_dim):
    ours, truth = (make_int8(heads, kv_heads, head_dim, normed=True) for _ in range(2))
    for position in (0, 3, 4, 11):
        rope(*ours[:-1], position, WorkerPool(1), ours[-1])
        rope_ref(*truth[:-1], position, None, truth[-1])
        np.testing.assert_allclose(ours[5], truth[5], rtol=1e-5)
        assert np.abs(ours[3].astype(int) - truth[3]).max() <= 1  # where f64 and f32 round a half apart
        assert (ours[3] != truth[3]).mean() < 0.01
    assert np.isfinite(ours[5]).sum() == 4 * 2 * kv_heads


def test_codes_to_the_bit():
    """Halves, zeros, numbers too small for a normal scale, and one that is none."""
    rows = np.random.default_rng(1).standard_normal((12, 64)).astype(np.float32)
    rows[0], rows[1, 0], rows[2] = 0, 127, rows[2] * np.float32(1e-42)
    rows[1, 1:6] = 0.5, 1.5, -2.5, 126.5, -127
    rows[3] *= np.float32(1e30)
    cache, scales = np.zeros((1, 2, 12, 1, 64), np.int8), np.zeros((1, 2, 12, 1), np.float32)
    norm, table = QKNorm(NONE, NONE, EPS), np.zeros(1, np.int32)
    qkv = np.concatenate([rows[:1], rows, rows])
    rope(qkv, (NONE, NONE), norm, cache, table, 0, WorkerPool(1), scales)
    codes, of = rounded_codes(torch.from_numpy(rows))
    for side in range(2):
        np.testing.assert_array_equal(cache[0, side, :, 0], codes)
        np.testing.assert_array_equal(scales[0, side, :, 0], of)
    assert cache[0, 0, 1, 0, :6].tolist() == [127, 0, 2, -2, 126, -127] and scales[0, 0, 1, 0] == 1
    assert (cache[0, 0, 0] == 0).all() and scales[0, 0, 0, 0] == 0
    assert (np.abs(cache[0, 0, 3:, 0] * scales[0, 0, 3:] - rows[3:]) <= 0.5001 * scales[0, 0, 3:]).all()


def test_a_broken_value_shows_in_its_scale():
    *args, scales = make_int8(1, 1, 10, rotated=False)
    args[0][2, 4] = np.nan
    rope(*args, 0, WorkerPool(1), scales)
    assert np.isfinite(scales[3, 0, 0, 0]) and np.isnan(scales[3, 1, 0, 0])
