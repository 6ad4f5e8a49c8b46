"""The byte-exact plan of GPU memory."""

import numpy as np
import pytest
from placement_cases import small_spec

from placement.plan import Choice, VramPlan, aligned
from profiler.common.errors import ContextError, InputError


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 512), (512, 512), (513, 1024), (2**40 + 1, 2**40 + 512)])
def test_alignment(size, expected):
    assert aligned(size) == expected
    np.testing.assert_array_equal(aligned(np.array([size])), [expected])


def test_rows_by_hand():
    # d_model 32, f32: a row is 128 bytes; QKV 96 rows, output 32, a norm of 128 bytes, each tensor aligned.
    spec = small_spec(n_layers=3, d_model=32, d_ff=10, n_heads=4, n_kv_heads=4, head_dim=8, vocab_size=100)
    plan = VramPlan(spec, context=7, predictor_bytes=(0, 100, 513), reserve=5, batch=1)
    choice = Choice(np.array([0, 0, 5]), np.array([False, True, True]), True)
    expected = {
        "dense weights": 2 * (12288 + 4096 + 512),
        "predictors": 512 + 1024,
        "KV cache": 2 * 2048,  # 2 x 7 x 32 x 4 = 1792
        "hot neurons": 3 * 1024,  # 5 x 128 = 640
        "head": 12800,  # 100 x 128
        "workspace: decode": sum(plan.workspace.decode.values()),
        "workspace: norms": 4 * 512,
        "workspace: RoPE tables": 2 * 512,  # 7 x 4 x 4 = 112
        "workspace: prefill": sum(plan.workspace.prefill.values()),
        "workspace: staging": 2 * 3 * 512,  # 3 rows of 128 bytes of each matrix
        "reserve: kernels, graphs, cuBLAS": 5,
    }
    assert dict(plan.rows(choice)) == expected
    assert plan.total_bytes(choice) == sum(expected.values())
    np.testing.assert_array_equal(plan.layer_bytes, [18944, 19456, 19968])


@pytest.mark.parametrize(("dtype", "expected"), [("f32", 2048), ("bf16", 1024), ("f16", 1024), ("int4", 1024)])
def test_keys_and_values_are_f16_but_of_f32_weights(dtype, expected):
    spec = small_spec(n_layers=1, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, dtype=dtype)
    assert VramPlan(spec, context=7, predictor_bytes=(0,)).kv_bytes == expected


def test_int8_has_a_scale_for_each_token_and_head():
    spec = small_spec(n_layers=1, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, kv="int8")
    assert (spec.kv_dtype, spec.kv_bytes_per_layer(7)) == ("int8", 2 * 7 * 4 * (8 + 4))
    assert VramPlan(spec, context=7, predictor_bytes=(0,)).kv_bytes == 2 * 512  # two tensors of their own
    assert VramPlan(spec, context=64, predictor_bytes=(0,)).kv_bytes == 2 * 64 * 4 * (8 + 4)


def test_a_pool_that_sequences_share_takes_what_it_has_room_for():
    plan = VramPlan(small_spec(d_model=32, n_heads=4, n_kv_heads=4, head_dim=8), 7, (0,), kv_tokens=1000)
    assert plan.kv_bytes == 1024 * 2 * 4 * 8 * 4  # blocks of 32 tokens, keys and values, f32
    assert plan.layer_bytes[0] - VramPlan(plan.spec, 7, (0,)).layer_bytes[0] == plan.kv_bytes - 2048


def test_nothing_on_the_gpu_takes_nothing_there():
    plan = VramPlan(small_spec(n_layers=2), 8, (9, 9))
    assert plan.total_bytes(Choice.all_cpu(2)) == 0
    assert {size for _, size in plan.rows(Choice.all_cpu(2))} == {0}


@pytest.mark.parametrize("context", [0, -1, 65])
def test_context_out_of_range(context):
    with pytest.raises(ContextError, match="1 to 64"):
        VramPlan(small_spec(), context, (0,))


@pytest.mark.parametrize(("name", "value"), [("prefill_chunk", 0), ("reserve", -1), ("batch", 3)])
def test_plan_of_what_makes_no_sense(name, value):
    with pytest.raises(InputError, match=name):
        VramPlan(small_spec(), 8, (0,), **{name: value})


@pytest.mark.parametrize("predictor_bytes", [(), (0, 0), (-1,)])
def test_predictor_bytes_must_fit_the_layers(predictor_bytes):
    with pytest.raises(InputError, match="1 layers"):
        VramPlan(small_spec(), 8, predictor_bytes)
