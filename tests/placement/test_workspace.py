"""Scratch on the GPU: sizes by hand, and that they are those that kernels and weights ask for."""

from dataclasses import replace

import pytest
import torch
from placement_cases import small_spec

from cpu_kernels.contract import LAYOUTS
from gpu_kernels import attention, low_rank, row_ffn, row_gemm, sampling, sparse_ffn
from hybrid.model.kv_cache import BLOCK_SIZE, SHARED_BLOCK_SIZE, KVCache, KVPool
from placement.workspace import (
    BATCHES,
    ENGINE_ROWS,
    KV_BLOCK,
    SERVER_ROWS,
    SHARED_KV_BLOCK,
    STAGING_LIMIT,
    Workspace,
    aligned,
    attention_splits,
    cached_tokens,
    down_parts,
    ffn_floats,
    gemm_floats,
    layer_bytes,
    neurons_bytes,
    predictor_bytes,
)

SEVEN = small_spec(
    n_layers=32, d_model=4096, d_ff=11008, n_heads=32, n_kv_heads=8, head_dim=128, vocab_size=32000, max_context=4096
)


def test_decode_by_hand():
    spec = small_spec(d_model=256, d_ff=1000, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=300)
    found = Workspace(spec, context=300, rank=100, prefill_chunk=7, batch=2).decode
    assert found == {
        "x": 2048,
        "normed": 2048,
        "ahead": 0,
        "added": 0,
        "qkv": 4096,  # 2 x (256 + 256) x 4
        "attended": 2048,
        "predictor hidden": 1024,  # 800
        "hidden": 8192,  # 8000
        "parts": 2 * 64 * 2 * 256 * 4,  # 264 programs for 4 blocks of columns: 66, at most 64
        "logits": 2560,  # 2400
        "attention splits": 2 * 4 * 4 * 64 * 4 + 2 * 512,  # 4 splits
        "masks": 4 * 4096,
        "ids": 3 * 4096,
        "sampling": 2 * 512 + 2 * 2560 + 19456,  # 8, 2400 and 19200
        "row gemm": 0,
        "control": 18 * 512,
    }


def test_prefill_by_hand():
    spec = small_spec(d_model=256, d_ff=4000, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=300)
    found = Workspace(spec, context=700, rank=0, prefill_chunk=600, batch=1).prefill
    assert found == {
        **dict.fromkeys(("x", "normed"), 600 * 256 * 4),
        **dict.fromkeys(("ahead", "added", "rotations"), 0),
        "positions": 2560,  # 2400
        "qkv": 512 * 512 * 4,
        "attended": 512 * 256 * 4,
        # Scales, three terms of 512 x 256 and 512 x 1344 in 16 bits, products of two terms with 2688 columns.
        "scratch": 4 * (2 * 512 + 768 * 256 + 768 * 1344 + 2 * 512 * 2688),
        "table": 512,
    }
    in_blocks = Workspace(small_spec(d_model=4096, d_ff=14000, dtype="int8"), 64, 0, 2048, 1).prefill
    assert in_blocks["scratch"] == 4 * (2 * 64 + 2 * 96 * 4096 + 4 * 64 * 4096 + 2048 * 4096)  # at most 4096 neurons
    assert in_blocks["x"] == 64 * 4096 * 4
    short, long = (Workspace(small_spec(max_context=10**5), context, 0, 64, 1).prefill for context in (64, 10**5))
    assert short | {"table": long["table"]} == long and long["table"] == aligned(4 * 391)


@pytest.mark.parametrize("kv_heads", [1, 8, 32, 300])
@pytest.mark.parametrize("capacity", [1, 64, 1000, 100_000])
def test_there_is_room_for_the_splits_of_attention(kv_heads, capacity):
    assert attention_splits(kv_heads, capacity) == attention.attention_splits(kv_heads, capacity)


@pytest.mark.parametrize("d", [1, 256, 257, 4096, 5120, 100_000])
def test_there_is_room_for_the_parts_of_the_sparse_ffn(d):
    assert down_parts(d) == sparse_ffn.down_parts(d)


@pytest.mark.parametrize("n", [1, 64, 4096, 4097, 12288, 32000])
def test_there_is_room_for_products_of_many_rows(n):
    for rows in (8, 16, 32):
        assert gemm_floats(rows, n, 300) == row_gemm.gemm_floats(rows, n, 300)
        for gated in (True, False):
            assert ffn_floats(rows, n, 300, gated) == row_ffn.ffn_floats(rows, n, 300, gated)


def test_room_for_products_of_many_rows_is_that_of_the_largest():
    def floats(rows=8, **changes):
        return Workspace(replace(SEVEN, **changes), 4096, 0, 1, rows).gemm_floats

    terms = 8 + 3 * 8 * 4096 // 2  # scales of 8 rows, and terms of 16 bits
    assert floats(dtype="f16") == terms + 8 * 4 * (4096 + 2048)  # sums of QKV in 4 parts
    assert floats(dtype="bf16") == terms + 3 * 8 * 11008 // 2 + 8 * 4 * 2 * 11008  # and of gate and up
    assert floats(dtype="f32") == floats(4, dtype="bf16") == 0 and floats(32, dtype="bf16") == 4 * floats(dtype="bf16")
    assert floats(dtype="int4", embedding_dtype="f16") == terms


@pytest.mark.parametrize("vocab", [1, 10, 300, 3000, 32000, 152_000])
@pytest.mark.parametrize("k", [1, 40, 1024])
def test_sampling_has_room(vocab, k):
    room = Workspace(small_spec(vocab_size=vocab), 8, 0, 1, 32).decode["sampling"]
    buffers = [8 * sampling.top_k_scratch(32, vocab, min(k, vocab))]
    buffers += [4 * 32 * sampling.blocks_of(vocab)] * 2 + [4 * 32 * min(sampling.MAX_K, vocab)] * 2
    assert sum(map(aligned, buffers)) <= room


@pytest.mark.parametrize("context", [1, 7, 256, 257, 4096])
def test_cached_tokens_are_those_of_the_cache(context):
    cache, pool = KVCache(SEVEN, context), KVPool(SEVEN, context)
    assert (KV_BLOCK, SHARED_KV_BLOCK) == (BLOCK_SIZE, SHARED_BLOCK_SIZE)
    assert cached_tokens(context) == cache.data.shape[1] * cache.block_size
    assert cached_tokens(context, SHARED_KV_BLOCK) == pool.blocks * pool.block_size


def test_rows_take_what_they_take_each():
    """A server's of 32 rows, whose blocks are smaller, beside an engine's of 8."""
    engine, server = (Workspace(SEVEN, 4096, 128, 2048, rows, block) for rows, block in ((8, 256), (32, 32)))
    assert (ENGINE_ROWS, SERVER_ROWS) == (8, 32) and BATCHES[-1] == 32
    assert (engine.blocks, server.blocks) == (16, 128)
    for name in ("x", "qkv", "hidden", "parts", "logits", "attention splits"):
        assert server.decode[name] == 4 * engine.decode[name]
    for name in ("masks", "ids"):
        assert server.decode[name] == engine.decode[name]
    assert server.prefill["scratch"] == engine.prefill["scratch"]
    assert sum(engine.decode.values()) < 13 * 2**20 and sum(server.decode.values()) < 48 * 2**20


@pytest.mark.parametrize("rank", [1, 128, 200])
def test_predictors_are_as_the_kernel_keeps_them(rank):
    d, f, floats = 300, 1000, torch.zeros
    codes = torch.zeros(rank, d, dtype=torch.int8), torch.zeros(f, rank, dtype=torch.int8)
    view = low_rank.DevicePredictorView.of(
        codes[0], floats(rank), floats(rank), codes[1], floats(f), floats(f), 0.0, "cpu"
    )
    tensors = (view.fc1, view.s1, view.b1, view.fc2, view.s2, view.b2)
    assert predictor_bytes(d, f, rank) == sum(aligned(tensor.nbytes) for tensor in tensors)
    assert predictor_bytes(d, f, 0) == 0


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_neurons_and_layers_are_tensors_of_their_own(dtype):
    spec = small_spec(
        d_model=300, d_ff=50, n_heads=3, head_dim=100, dtype=dtype, ffn_bias=True, qkv_bias=True, norm="layer"
    )
    row = LAYOUTS[dtype].elements(300) * (2 if dtype == "bf16" else 1)
    assert neurons_bytes(spec, 7) == 3 * aligned(7 * row) + 2 * 512
    vectors = 2 * aligned(1200) + aligned(1200) + aligned(4 * 500)  # the FFN's norm, bias of down, biases of QKV
    assert layer_bytes(spec) == aligned(500 * row) + aligned(300 * row) + vectors


def test_staging_holds_a_quarter_of_a_layer_or_64_mib():
    small = Workspace(small_spec(d_ff=10, d_model=32), 8, 0, 1, 1)
    assert small.staging_neurons == 3 and small.staging_bytes == 3 * 512
    one = Workspace(small_spec(d_ff=1), 8, 0, 1, 1)
    assert one.staging_neurons == 1
    large = Workspace(SEVEN, 2048, 0, 256, 8)
    assert large.staging_neurons < SEVEN.d_ff / 4
    assert STAGING_LIMIT - SEVEN.neuron_bytes - 5 * 512 <= large.staging_bytes <= STAGING_LIMIT
    assert dict(large.rows())["workspace: staging"] == 2 * large.staging_bytes
