"""What goes to the GPU: byte for byte the CPU's, where the placement says, and in the bytes that the plan has."""

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE
from step_cases import CAPACITY, StepCase, random_predictor, tiny_model

from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.weights import DENSE, HEAD, HOT, KV, PREDICTORS, GpuWeights
from placement.plan import VramPlan, aligned
from placement.workspace import predictor_bytes

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def take(case):
    """The weights of a case's model in an arena of exactly their size."""
    given = case.model, case.placement, case.cache, case.host.zero_copy
    counting = DeviceArena(torch.device(DEVICE))
    GpuWeights.take(counting, *given)
    arena = DeviceArena(torch.device(DEVICE), counting.used)
    return GpuWeights.take(arena, *given), arena


def assert_rows(found, matrix, rows):
    assert (found.columns, found.kind) == (matrix.columns, matrix.dtype)
    assert torch.equal(found.rows.cpu().view(torch.uint8), matrix.tensor(slice(None)).view(torch.uint8)[:rows])


def test_rows_that_kernels_read_in_host_memory_follow_the_hot_ones(models):
    """The very same memory, of which the GPU holds no copy but of biases."""
    case = StepCase(tiny_model("llama-tied-mha-bias", models), share=0.4, on_cpu=(1,), zero_copy=20)
    weights, _ = take(case)
    matrices, zero_copy, hot = case.model.ffns[0].matrices, weights.layers[0].zero_copy, case.model.ffns[0].hot
    for found, matrix in (
        (zero_copy.gate, matrices.gate),
        (zero_copy.up, matrices.up),
        (zero_copy.down, matrices.down),
    ):
        assert found.rows.data_ptr() == matrix.tensor(slice(hot, None)).data_ptr() and len(found.rows) == 20
    assert torch.equal(zero_copy.up_bias.cpu(), matrices.up_bias[hot : hot + 20].float())
    assert torch.equal(zero_copy.gate_bias.cpu(), matrices.gate_bias[hot : hot + 20].float())
    case.close()


CASES = [("llama-relu", "int8"), ("llama-tied-mha-bias", "f32"), ("opt", "bf16"), ("qwen3", "int4")]
CASES += [("persimmon", "f32"), ("gemma3", "bf16"), ("olmo2", "f32"), ("falcon", "int8")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_everything_is_where_it_should_be_and_the_same(models, name, dtype):
    case = StepCase(tiny_model(name, models, dtype), share=0.4, on_cpu=(1,))
    weights, _ = take(case)
    block, layer = case.model.blocks[0], weights.layers[0]
    hot, every = case.model.ffns[0].hot, len(case.model.ffns[0].up.rows)
    assert 0 < hot < every and weights.layers[1] is None
    matrices = block.ffn.matrices
    assert_rows(layer.qkv, block.attention.qkv.matrix, None)
    assert_rows(layer.out, block.attention.out.matrix, None)
    assert_rows(layer.ffn.up, matrices.up, hot)
    assert_rows(layer.ffn.down, matrices.down, hot)
    assert (layer.ffn.gate is None) == (matrices.gate is None)
    if matrices.gate is not None:
        assert_rows(layer.ffn.gate, matrices.gate, hot)
    assert_rows(weights.head, case.model.head.matrix, None)
    q_norm, post, following = block.attention.q_norm, block.norms.attention_post, case.model.blocks[1].norms.attention
    for found, expected in (
        (layer.qkv_bias, block.attention.qkv.bias),
        (layer.out_bias, block.attention.out.bias),
        (layer.down_bias, matrices.down_bias),
        (layer.ffn.up_bias, None if matrices.up_bias is None else matrices.up_bias[:hot]),
        (layer.ffn.gate_bias, None if matrices.gate_bias is None else matrices.gate_bias[:hot]),
        (layer.q_norm and layer.q_norm.weight, q_norm and q_norm.weight),
        (layer.q_norm and layer.q_norm.bias, q_norm and q_norm.bias),
        (layer.ffn_norm.weight, block.norms.ffn and block.norms.ffn.weight),
        (layer.ffn_norm.bias, block.norms.ffn and block.norms.ffn.bias),
        (layer.attention_post and layer.attention_post.weight, post and post.weight),
        (weights.norms[1].weight, following and following.weight),
        (weights.norms[2].weight, case.model.final_norm.weight),
    ):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == torch.float32 and torch.equal(found.cpu(), expected.float())
    assert layer.cache.shape == case.cache.data.shape[1:]
    case.close()


def test_nothing_but_norms_for_layers_and_a_head_on_the_cpu(models):
    case = StepCase(tiny_model("llama-relu", models), on_cpu=(0, 1), head=False)
    weights, arena = take(case)
    assert weights.layers == (None, None) and weights.head is None and len(weights.norms) == 3
    assert set(arena.spent) == {DENSE, HEAD}
    case.close()


def test_predictors_are_copied(models):
    case = StepCase(tiny_model("llama-relu", models), predictors=True)
    weights, arena = take(case)
    found, theirs = weights.layers[0].predictor, case.model.ffns[0].predictor
    for part in ("fc1", "s1", "b1", "fc2", "s2", "b2"):
        assert torch.equal(getattr(found, part).cpu(), torch.from_numpy(getattr(theirs, part)))
    assert found.threshold == pytest.approx(random_predictor(case.model.ffns[0]).threshold)
    spec = case.model.spec
    assert arena.spent[PREDICTORS] == 2 * predictor_bytes(spec.d_model, spec.d_ff, 5)
    case.close()


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize(("share", "on_cpu", "head"), [(0.4, (), True), (1.0, (0,), True), (0.0, (1,), False)])
def test_bytes_are_those_of_the_plan(models, name, dtype, share, on_cpu, head):
    case = StepCase(tiny_model(name, models, dtype), share, on_cpu, head)
    _, arena = take(case)
    spec = case.model.spec
    plan = VramPlan(spec, CAPACITY, (0,) * spec.n_layers)
    planned, norms = dict(plan.rows(case.placement.choice)), plan.workspace.norms
    final = plan.workspace.norm_bytes
    assert arena.spent.get(HOT, 0) == planned["hot neurons"]
    assert arena.spent.get(KV, 0) == planned["KV cache"]
    assert arena.spent[HEAD] == planned["head"] + final
    assert arena.spent[DENSE] == planned["dense weights"] + norms - final
    assert arena.used == aligned(arena.used)
    case.close()


def test_scales_of_int8_are_in_the_plan(models):
    case = StepCase(tiny_model("llama-relu", models), kv="int8")
    weights, arena = take(case)
    layer, spec = weights.layers[0], case.model.spec
    assert layer.cache.dtype == torch.int8 and layer.scales.shape == layer.cache.shape[:4]
    plan = VramPlan(spec, CAPACITY, (0,) * spec.n_layers)
    assert arena.spent[KV] == dict(plan.rows(case.placement.choice))["KV cache"]
    assert arena.spent[KV] < VramPlan(replace(spec, kv="auto"), CAPACITY, (0,) * spec.n_layers).kv_bytes * spec.n_layers
    case.close()
