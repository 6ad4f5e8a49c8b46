"""Cost model: times worked out by hand, and what must hold for any model."""

from dataclasses import replace

import numpy as np
import pytest
from placement_cases import NO_GPU, ROUND_HARDWARE, random_model, small_spec

from placement import Choice, CostModel, VramPlan
from profiler.common.errors import InputError

FIRING = np.array([[0.25, 1.0, 0.5]])  # order of the neurons: 1, 2, 0
HANDOFF = 1e-3 + 32 / 1e6  # two vectors of 4 f32
ON_CPU = 0.88 * 1e6  # bytes/s at which dense parts on the CPU are read
BETWEEN = 80e-6  # two tokens, on the GPU
# Dense weights: 4 x 4 x 4 + 2 norms of 4, in f32; keys and values of 8 tokens.
ATTENTION_BYTES = 288 + 256
HEAD_BYTES = 176


def small_model(strategy="exact", predictor_bytes=0, hardware=ROUND_HARDWARE, **changes):
    plan = VramPlan(small_spec(**changes), 8, (predictor_bytes,))
    return CostModel(plan, hardware, FIRING, strategy, predicted_ratio=1.6, group_size=1)


def on_gpu(hot, head=True):
    return Choice(np.array([hot]), np.array([True]), head)


def test_split_layer_by_hand():
    # exact reads 16 + 32 f bytes of a neuron: 48 of the hot one, 32 + 24 of the cold ones.
    # Kernels, each with a small one: QKV, attention's two, output; the predictor's two; head and choice of a token.
    time = small_model(predictor_bytes=40).evaluate(on_gpu(1))
    assert time.attention == pytest.approx(7e-5 + ATTENTION_BYTES / 1e7)
    assert time.predictor == pytest.approx(3e-5 + 40 / 1e7)
    assert time.ffn == pytest.approx(1e-4 + 56 / 1e6)
    assert time.handoff == pytest.approx(HANDOFF)
    assert time.head == pytest.approx(3e-5 + BETWEEN + HEAD_BYTES / 1e7)
    parts = time.attention + time.predictor + time.ffn + time.handoff + time.head
    assert time.seconds == pytest.approx(parts) and time.tokens_per_second == pytest.approx(1 / parts)


def test_hot_neurons_hide_the_hand_off():
    hot = 3e-5 + 48 / 1e4  # gate with up, down, sum
    slow_gpu = small_model(hardware=replace(ROUND_HARDWARE, gpu_read_bandwidth=1e4)).evaluate(on_gpu(1))
    assert slow_gpu.ffn == pytest.approx(hot) and slow_gpu.handoff == 0
    cold = 1e-4 + 56 / 1e6
    part_hidden = replace(ROUND_HARDWARE, gpu_read_bandwidth=1e4, handoff_seconds=hot - cold + 1e-4 - 32 / 1e6)
    found = small_model(hardware=part_hidden).evaluate(on_gpu(1))
    assert found.ffn == pytest.approx(hot) and found.handoff == pytest.approx(1e-4)


def test_all_hot_has_no_handoff_and_all_cold_has_one():
    model = small_model()
    assert model.evaluate(on_gpu(3)).handoff == 0
    assert model.evaluate(on_gpu(3)).ffn == pytest.approx(3e-5 + 104 / 1e7)
    assert model.evaluate(on_gpu(0)).handoff == pytest.approx(HANDOFF)
    assert model.evaluate(on_gpu(0)).ffn == pytest.approx(1e-4 + 104 / 1e6)


def test_predicted_neurons_are_compacted_first():
    assert small_model("learned").evaluate(on_gpu(3)).ffn == pytest.approx(4e-5 + 91.2 / 1e7)


def test_dense_reads_rows_in_order():
    scattered = replace(ROUND_HARDWARE, cpu_scattered_bandwidth=1e3)
    assert small_model("dense", hardware=scattered).evaluate(on_gpu(0)).ffn == pytest.approx(1e-4 + 144 / 1e6)
    assert small_model(hardware=scattered).evaluate(on_gpu(0)).ffn == pytest.approx(1e-4 + 104 / 1e3)


def test_a_token_costs_something_beside_its_kernels_on_the_gpu_only():
    model = small_model(hardware=replace(ROUND_HARDWARE, token_seconds=1.0))
    for choice in (on_gpu(1), on_gpu(1, head=False)):
        assert model.evaluate(choice).head - small_model().evaluate(choice).head == pytest.approx(1.0)
    assert model.evaluate(Choice.all_cpu(1)).seconds == small_model().evaluate(Choice.all_cpu(1)).seconds
    assert (model.columns()[0][-1, :2] > 1).all()


def test_measured_kernels_and_both_ways_of_the_bus_count():
    kernels = {"gemv": ((0.0, 1e-3),), "attention": ((0.0, 2e-3),), "predictor": ((0.0, 3e-3),)}
    hardware = replace(ROUND_HARDWARE, gpu_kernels=kernels | {"sparse_ffn": ((0.0, 4e-3),)}, pcie_host_bandwidth=1e5)
    model = small_model(predictor_bytes=40, hardware=hardware)
    time = model.evaluate(on_gpu(3))
    assert time.attention == pytest.approx(2 * 1e-3 + 2e-3 + ATTENTION_BYTES / 1e7)
    assert time.predictor == pytest.approx(3e-3 + 40 / 1e7)
    assert time.ffn == pytest.approx(4e-3 + 104 / 1e7)
    assert time.head == pytest.approx(1e-3 + 1e-5 + BETWEEN + HEAD_BYTES / 1e7)
    assert model.handoff_seconds == pytest.approx(1e-3 + 16 / 1e5 + 16 / 1e6)


@pytest.mark.parametrize("hardware", [ROUND_HARDWARE, NO_GPU])
def test_everything_on_the_cpu_has_no_handoff(hardware):
    time = small_model(predictor_bytes=40, hardware=hardware).evaluate(Choice.all_cpu(1))
    assert time.handoff == 0
    assert time.attention == pytest.approx(ATTENTION_BYTES / ON_CPU)
    assert time.predictor == pytest.approx(40 / ON_CPU)
    assert time.head == pytest.approx(HEAD_BYTES / ON_CPU)


def test_head_or_layer_alone_on_the_cpu_costs_one_handoff():
    model = small_model()
    layer_on_cpu = Choice(np.array([0]), np.array([False]), True)
    assert model.evaluate(layer_on_cpu).handoff == pytest.approx(HANDOFF)
    assert model.evaluate(on_gpu(3, head=False)).head == pytest.approx(HANDOFF + BETWEEN + HEAD_BYTES / ON_CPU)


@pytest.mark.parametrize(
    ("strategy", "gated", "expected"),
    [
        ("dense", True, 3 * 48),
        ("exact", True, 3 * 16 + 32 * 1.75),
        ("learned", True, 16 * (1.0 + 0.8 + 0.4) + 32 * 1.75),
        ("dense", False, 3 * 32),
        ("exact", False, 3 * 16 + 16 * 1.75),
        ("learned", False, 16 * (1.0 + 0.8 + 0.4) + 16 * 1.75),
    ],
)
def test_bytes_read_by_strategy(strategy, gated, expected):
    time = small_model(strategy, gated=gated).evaluate(Choice.all_cpu(1))
    assert time.ffn == pytest.approx(1e-4 + expected / 1e6)


def test_sliding_window_bounds_the_keys_read():
    full = small_model().evaluate(Choice.all_cpu(1)).attention
    windowed = small_model(sliding_window=3, sliding_layers=(True,)).evaluate(Choice.all_cpu(1)).attention
    assert full - windowed == pytest.approx(5 * 32 / ON_CPU)


def test_order_is_by_frequency_and_stable():
    plan = VramPlan(small_spec(d_ff=5), 8, (0,))
    model = CostModel(plan, ROUND_HARDWARE, np.array([[0.5, 0.0, 1.0, 0.5, 0.5]]), "exact", group_size=2)
    np.testing.assert_array_equal(model.order, [[2, 0, 3, 4, 1]])
    assert model.order.dtype == np.int32
    np.testing.assert_array_equal(model.group_counts, [0, 2, 4, 5])
    levels = np.random.default_rng(0).integers(0, 3, (1, 999)) / 2  # long runs of ties
    model = CostModel(VramPlan(small_spec(d_ff=999), 8, (0,)), ROUND_HARDWARE, levels, "exact")
    np.testing.assert_array_equal(model.order[0], sorted(range(999), key=lambda neuron: -levels[0, neuron]))


@pytest.mark.parametrize("seed", range(20))
def test_columns_agree_with_evaluate_and_plan(seed):
    model = random_model(seed)
    seconds, sizes = model.columns()
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, seconds.shape[1], len(seconds) - 1)
    picks[0] = max(picks[0], 1)  # something on the GPU, as the columns take it
    head = int(rng.integers(2))
    choice = Choice(model.group_counts[np.maximum(picks - 1, 0)], picks > 0, bool(head))
    rows = np.arange(len(picks))
    total = seconds[rows, picks].sum() + seconds[-1, head]
    assert model.evaluate(choice).seconds == pytest.approx(total, rel=1e-12)
    size = int(sizes[rows, picks].sum() + sizes[-1, head])
    assert model.plan.total_bytes(choice) == size + model.plan.workspace_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"firing": np.zeros((1, 4))},
        {"firing": np.array([[0.0, np.nan, 0.0]])},
        {"firing": np.array([[0.0, 1.1, 0.0]])},
        {"firing": np.array([[0.0, -0.1, 0.0]])},
        {"strategy": "oracle"},
        {"predicted_ratio": 0.0},
        {"predicted_ratio": float("nan")},
        {"group_size": 0},
    ],
)
def test_inputs_that_do_not_fit(changes):
    with pytest.raises(InputError):
        replace(small_model(), **changes)


def test_gpu_choice_without_a_gpu_is_refused():
    model = small_model(hardware=NO_GPU)
    with pytest.raises(InputError, match="no GPU"):
        model.evaluate(on_gpu(1))
    with pytest.raises(InputError, match="no GPU"):
        model.columns()


@pytest.mark.parametrize(("dtype", "matrices", "neurons"), [("int8", 1.4, 3.0), ("int4", 1.8, 4.0)])
def test_blocks_cost_the_gpu_more_than_their_bytes(dtype, matrices, neurons):
    spec = small_spec(dtype=dtype)
    model = CostModel(VramPlan(spec, 8, (0,)), ROUND_HARDWARE, FIRING, "dense", group_size=1)
    keys = spec.kv_bytes_per_layer(8) / 1e7
    time = model.evaluate(on_gpu(3))
    assert time.attention == pytest.approx(7e-5 + keys + matrices * spec.layer_dense_bytes / 1e7)
    assert time.ffn == pytest.approx(3e-5 + neurons * spec.layer_ffn_bytes / 1e7)
    assert time.head == pytest.approx(3e-5 + BETWEEN + matrices * spec.head_bytes / 1e7)


def test_rows_of_blocks_are_read_slower_on_the_cpu():
    seconds = [
        CostModel(VramPlan(small_spec(dtype=dtype), 8, (0,)), ROUND_HARDWARE, FIRING, "exact", group_size=1)
        for dtype in ("int8", "int4")
    ]
    rates = [model.evaluate(on_gpu(0)).ffn - 1e-4 for model in seconds]
    expected = [
        float(model._read_bytes[0, -1]) / 1e6 / share for model, share in zip(seconds, (0.75, 0.4), strict=True)
    ]
    assert rates == pytest.approx(expected)


def test_pcie_and_the_cpu_share_host_memory():
    """Without neurons over PCIe the CPU has its full rate; beside them what they leave of the read bandwidth."""
    hardware = replace(ROUND_HARDWARE, cpu_read_bandwidth=1e6, pcie_bandwidth=5e5, cpu_layer_seconds=0.0)
    plan = VramPlan(small_spec(d_ff=64), 8, (8,))
    model = CostModel(plan, hardware, np.full((1, 64), 0.5), "learned", group_size=1)
    copied = model._zero_copy_bytes(np.array([[8]]), model._hot_seconds(np.array([[8]])))[0, 0]
    cold = float(model._read_bytes[0, -1] - model._read_bytes[0, 8])
    assert 0 < copied < cold and model._ffn_beside_pcie == pytest.approx(6e5)
    time = model.evaluate(Choice(np.array([8]), np.array([True]), True))
    assert time.ffn + time.handoff == pytest.approx((cold - copied) / 6e5 + model.handoff_seconds)


@pytest.mark.parametrize("pcie", [1e4, 1e5, 9e5])
def test_neurons_are_copied_only_where_that_is_faster(pcie):
    """What PCIe takes from the CPU's memory may cost more than the copies save."""
    hardware = replace(ROUND_HARDWARE, cpu_read_bandwidth=1e6, cpu_scattered_bandwidth=9e5, pcie_bandwidth=pcie)
    firing = np.sort(np.random.default_rng(0).random((1, 64)))[:, ::-1]
    model = CostModel(VramPlan(small_spec(d_ff=64), 8, (8,)), hardware, firing, "learned", group_size=1)
    alone = CostModel(
        VramPlan(small_spec(d_ff=64), 8, (8,)), replace(hardware, pcie_bandwidth=1e-3), firing, "learned", group_size=1
    )
    counts, handoff = np.arange(65)[None], model.handoff_seconds
    with_copies = model._layers_on_gpu(counts)[2:].sum(axis=0)
    on_gpu, on_cpu = alone._hot_seconds(counts), alone._cold_seconds(counts)
    without = np.maximum(on_gpu, on_cpu + np.where(counts < 64, handoff, 0.0))
    assert (with_copies <= without * (1 + 1e-9)).all()


def test_certified_reads_copies_of_all_and_rows_of_those_in_doubt():
    # Neurons of 3 rows of 4 f32: 16 bytes a row, of which certified reads 16 (f + 0.5 (1 - f)) + 32 f.
    plan = VramPlan(small_spec(), 8, (0,), certified=True)
    model = CostModel(plan, ROUND_HARDWARE, FIRING, "certified", group_size=1, uncertain=0.5)
    cold = sum(16 * (f + 0.5 * (1 - f)) + 32 * f for f in FIRING[0])
    time = model.evaluate(on_gpu(0))
    assert time.ffn == pytest.approx(1e-4 + cold / 1e6)
    # Three rows of 128 bytes and four scales, and two bounds each, in three tensors of 512 bytes.
    assert plan.copy_bytes == 3 * 512
    assert time.predictor == pytest.approx(2e-5 + 1.4 * plan.copy_bytes / 1e7)
    assert model.evaluate(Choice.all_cpu(1)).predictor == pytest.approx(plan.copy_bytes / ON_CPU)
    assert plan.total_bytes(on_gpu(0)) - replace(plan, certified=False).total_bytes(on_gpu(0)) == plan.copy_bytes
    assert ("certificates", plan.copy_bytes) in plan.rows(on_gpu(0))


def test_a_plan_without_certificates_is_not_for_certified():
    with pytest.raises(InputError, match="a plan has certificates where the strategy is certified"):
        small_model("certified")


def test_proxy_reads_copies_of_all_and_whole_neurons_that_pass():
    # Neurons of 3 rows of 4 f32: 48 bytes, of which proxy reads those that pass, and nothing of the others.
    plan = VramPlan(small_spec(activation="silu"), 8, (0,), proxied=True)
    model = CostModel(plan, ROUND_HARDWARE, FIRING, "proxy", group_size=1)
    dense = CostModel(replace(plan, proxied=False), ROUND_HARDWARE, FIRING, "dense", group_size=1)
    read, alone = model.evaluate(Choice.all_cpu(1)), dense.evaluate(Choice.all_cpu(1))
    assert read.ffn == pytest.approx(1e-4 + 48 * FIRING.sum() / model.hardware.scattered_bandwidth)
    assert read.predictor > alone.predictor == 0 and read.attention == alone.attention
    assert model.evaluate(on_gpu(0)).predictor > 0
    assert plan.total_bytes(on_gpu(0)) - replace(plan, proxied=False).total_bytes(on_gpu(0)) == plan.copy_bytes
    assert ("proxies", plan.copy_bytes) in plan.rows(on_gpu(0))
    with pytest.raises(InputError, match="a plan has proxies where the strategy is proxy"):
        CostModel(plan, ROUND_HARDWARE, FIRING, "dense")
