"""Decode attention against its reference and torch: heads, lengths, windows, block order, number of workers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cpu_kernels.attention import attend_heads, decode_attention, decode_attention_ref, exp
from cpu_kernels.worker_pool import WorkerPool


def make(heads, kv_heads, head_dim, length, block_size=16, scale=1.0, dtype=np.float32):
    """q, cache and table of a sequence whose blocks lie in random order among others that hold NaN."""
    rng = np.random.default_rng(heads + head_dim + length)
    used = -(-length // block_size)
    cache = np.full((used + 2, 2, kv_heads, block_size, head_dim), np.nan, dtype)
    table = rng.permutation(used + 2)[:used].astype(np.int32)
    for i in range(length):
        cache[table[i // block_size], :, :, i % block_size] = rng.standard_normal((2, kv_heads, head_dim))
    return (rng.standard_normal((heads, head_dim)) * scale).astype(np.float32), cache, table


def both(q, cache, table, length, window=None):
    ours, truth = np.full_like(q, np.nan), np.full_like(q, np.nan)
    decode_attention(q, cache, table, length, window, ours, WorkerPool(1))
    decode_attention_ref(q, cache, table, length, window, truth, None)
    return ours, truth


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (8, 2), (17, 1)])
@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_matches_reference(heads, kv_heads, head_dim, length, dtype):
    args = make(heads, kv_heads, head_dim, length, dtype=dtype)
    np.testing.assert_allclose(*both(*args, length), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("length", [1, 16, 17, 50])
@pytest.mark.parametrize("window", [1, 3, 16, 17, 49, 50, 1000])
def test_window(length, window):
    args = make(4, 2, 10, length)
    ours, truth = both(*args, length, window)
    np.testing.assert_allclose(ours, truth, rtol=2e-5, atol=2e-6)
    if window >= length:
        assert (ours == both(*args, length)[0]).all()
    if window == 1:
        table, i = args[2], length - 1
        newest = args[1][table[i // 16], 1, :, i % 16]
        np.testing.assert_allclose(ours, newest.repeat(2, axis=0), rtol=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_sizes(block_size):
    np.testing.assert_allclose(*both(*make(6, 3, 17, 100, block_size), 100, 90), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_flat_and_steep_scores(scale):
    """Up to scores whose exponentials underflow, and a largest score that keeps growing."""
    q, cache, table = make(4, 4, 64, 40, scale=scale)
    ours, truth = both(q, cache, table, 40)
    # A score of thousands is known to 1e-7 of itself, and its error becomes the relative error of its weight.
    np.testing.assert_allclose(ours, truth, rtol=2e-5 + 2e-6 * scale, atol=2e-6 * (1 + scale))
    cache[table, 0] = 0
    for i in range(40):
        cache[table[i // 16], 0, :, i % 16] = q * i / np.square(q).sum(1, keepdims=True)
    np.testing.assert_allclose(*both(q, cache, table, 40), rtol=2e-5, atol=2e-6)


def test_reference_is_torchs_attention():
    q, cache, table = make(6, 2, 10, 21)
    together = torch.from_numpy(np.concatenate(cache[table], axis=2)[:, :, :21]).double()
    mask = torch.arange(21) >= 21 - 5
    query = torch.from_numpy(q).double()[:, None]
    expected = F.scaled_dot_product_attention(query[None], *together[:, None], attn_mask=mask[None], enable_gqa=True)
    np.testing.assert_allclose(both(q, cache, table, 21, 5)[1], expected[0, :, 0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 2), (5, 5)])
def test_same_bits_for_any_number_of_workers_and_order_of_blocks(heads, kv_heads):
    q, cache, table = make(heads, kv_heads, 64, 100)
    pool, answers = WorkerPool(7), []
    for workers in (1, 2, 3, 7):
        for blocks, ids in ((cache, table), (cache[table], np.arange(len(table), dtype=np.int32))):
            scratch = np.full((heads, 18), np.nan, np.float32)
            answers.append(np.full_like(q, np.nan))
            pool.run(attend_heads, workers, q, blocks, None, ids, 3, 100, scratch, answers[-1])
    pool.close()
    assert np.isfinite(answers[0]).all()
    for answer in answers[1:]:
        assert (answer == answers[0]).all()


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_head_is_one_workers(workers):
    q, cache, table = make(8, 2, 10, 20)
    written = np.zeros(8, int)
    for worker in range(workers):
        out = np.full_like(q, np.nan)
        attend_heads(worker, workers, q, cache, None, table, 0, 20, np.empty((8, 18), np.float32), out)
        written += np.isfinite(out).all(1)
    assert (written == 1).all()


def test_exp():
    x = np.linspace(-87, 0, 3001, dtype=np.float32)
    truth = np.exp(x.astype(np.float64)).astype(np.float32)
    ours = np.array([exp(value) for value in x])
    assert (np.abs(ours - truth) <= 3 * np.spacing(truth)).all()
    assert 0 < exp(np.float32(-np.inf)) < 2e-38 and exp(np.float32(0)) == 1 and np.isnan(exp(np.float32(np.nan)))


def test_a_broken_value_shows():
    q, cache, table = make(2, 1, 10, 20)
    cache[table[1], 0, 0, 3, 0] = np.nan
    assert np.isnan(both(q, cache, table, 20)[0]).all()


def test_misfits_are_refused():
    q, cache, table = make(4, 2, 10, 20)
    pool, out = WorkerPool(1), np.empty_like(q)
    for bad in ((q[:3], cache, table, out[:3]), (q, cache, table, out[:3]), (q, cache[0], table, out)):
        with pytest.raises(ValueError, match="shapes do not fit"):
            decode_attention(*bad[:3], 20, None, bad[3], pool)
    with pytest.raises(ValueError, match="f32, f16 or int8 cache"):
        decode_attention(q, cache.astype(np.float64), table, 20, None, out, pool)
    with pytest.raises(ValueError, match="int32 table"):
        decode_attention(q, cache, table.astype(np.int64), 20, None, out, pool)
    with pytest.raises(ValueError, match="f32 q"):
        decode_attention(q.astype(np.float64), cache, table, 20, None, out, pool)
    for length, window in ((0, None), (33, None), (20, 0)):
        with pytest.raises(ValueError, match="wants 1 to 32 keys and a window of at least 1"):
            decode_attention(q, cache, table, length, window, out, pool)
    for ids in (table - np.int32(5), table + np.int32(4)):
        with pytest.raises(ValueError, match="leave the cache of 4 blocks"):
            decode_attention(q, cache, ids, 20, None, out, pool)


def make_int8(heads, kv_heads, head_dim, length):
    """As `make`, with codes, and scales whose places beyond the sequence hold NaN."""
    q, wide, table = make(heads, kv_heads, head_dim, length)
    scales = np.abs(wide).max(-1) / np.float32(127)
    codes = np.nan_to_num(np.rint(wide / scales[..., None]), nan=99).astype(np.int8)
    return (q, codes, table), scales.astype(np.float32)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 10), (8, 2, 64), (17, 1, 128)])
@pytest.mark.parametrize("length", [1, 17, 1000])
def test_int8_matches_reference(heads, kv_heads, head_dim, length):
    args, scales = make_int8(heads, kv_heads, head_dim, length)
    ours, truth, plain = (np.full_like(args[0], np.nan) for _ in range(3))
    for window in (None, 16):
        decode_attention(*args, length, window, ours, WorkerPool(1), scales)
        decode_attention_ref(*args, length, window, truth, None, scales)
        np.testing.assert_allclose(ours, truth, rtol=2e-5, atol=2e-6)
    decode_attention_ref(*make(heads, kv_heads, head_dim, length), length, 16, plain, None)
    assert 1e-4 < np.abs(ours - plain).max() < 0.05  # what the rounding costs


def test_int8_has_the_same_bits_for_any_number_of_workers():
    (q, codes, table), scales = make_int8(8, 2, 64, 100)
    pool, answers = WorkerPool(3), [np.full_like(q, np.nan) for _ in range(3)]
    for workers, answer in enumerate(answers, 1):
        scratch = np.full((8, 18), np.nan, np.float32)
        pool.run(attend_heads, workers, q, codes, scales, table, 3, 100, scratch, answer)
    pool.close()
    assert np.isfinite(answers[0]).all() and all((answer == answers[0]).all() for answer in answers)


def test_scales_belong_to_int8_alone():
    (q, codes, table), scales = make_int8(4, 2, 10, 20)
    wide, out = make(4, 2, 10, 20)[1], np.empty_like(q)
    for cache, given in ((codes, None), (wide, scales), (codes, scales[:1]), (codes, scales.astype(np.float64))):
        with pytest.raises(ValueError, match=r"scales .* beside an int8 cache alone"):
            decode_attention(q, cache, table, 20, None, out, WorkerPool(1), given)
