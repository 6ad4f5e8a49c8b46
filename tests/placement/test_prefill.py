"""Prefill's ways for cold neurons: times worked out by hand, and how a layer is split among them."""

from dataclasses import replace

import pytest
from placement_cases import ROUND_HARDWARE, small_spec

from placement.prefill import GROUP, PRODUCT_SHARE, ColdPrefill
from profiler.common.hardware import HardwareProfile

# A neuron has 3 rows of 4 f32: 12 weights, 48 bytes.
HARDWARE = replace(ROUND_HARDWARE, cpu_gemm_flops=1e6, gpu_gemm_flops=1e7, pcie_host_bandwidth=5e5)
SMALL = ColdPrefill(HARDWARE, small_spec(d_ff=1000))


def with_hardware(cost=SMALL, **changes):
    return replace(cost, hardware=replace(cost.hardware, **changes))


RESUMED = 1e-4  # the launches after the CPU's part


def exchange(tokens):
    return RESUMED + 1e-3 + 1e-4 + 16 * tokens / 5e5 + 16 * tokens / 1e6


def on_cpu(cost, tokens, cold, hot=0, **given):
    return cost.seconds(tokens, hot, cold, cold, **given)


@pytest.mark.parametrize(("tokens", "passes"), [(1, 1), (32, 1), (33, 2), (40, 2)])
def test_few_tokens_read_the_rows_for_every_32_and_cost_more_each(tokens, passes):
    fast = replace(with_hardware(cpu_gemm_flops=1e12), few=40)
    assert on_cpu(fast, tokens, 10) == pytest.approx(passes * 480 / 1e6 + exchange(tokens))
    slow = replace(with_hardware(cpu_gemm_flops=1e3), few=40)
    assert on_cpu(slow, tokens, 10) == pytest.approx(4 * 2 * tokens * 120 / 1e3 + exchange(tokens))


def test_many_tokens_read_the_rows_once_or_compute():
    assert on_cpu(with_hardware(cpu_gemm_flops=1e9), 64, 10) == pytest.approx(480 / 1e6 + exchange(64))
    each = (64 + 16) * 512 / (512 + 16)  # 16 tokens' worth of bringing weights into panels, of 512 part of the rate
    assert on_cpu(SMALL, 64, 10) == pytest.approx(2 * each * 120 / 1e6 + exchange(64))
    none = with_hardware(cpu_panel_tokens=0.0)
    assert on_cpu(none, 64, 10) == pytest.approx(2 * 64 * 120 / 1e6 + exchange(64))
    fast = replace(with_hardware(cpu_fast_gemm_flops=3e6), precision="fast")
    assert on_cpu(fast, 64, 10) == pytest.approx(2 * each * 120 / 3e6 + exchange(64))
    assert on_cpu(replace(fast, precision="precise"), 64, 10) == on_cpu(SMALL, 64, 10)
    assert on_cpu(replace(SMALL, precision="fast"), 64, 10) == on_cpu(SMALL, 64, 10)  # not measured


def test_streaming_overlaps_with_the_products_and_with_what_is_before():
    assert SMALL.seconds(1, 0, 10, 0) == pytest.approx(480 / 1e6)
    assert SMALL.seconds(100, 0, 10, 0) == pytest.approx(2 * 100 * 120 / 1e7)
    assert SMALL.seconds(100, 5, 10, 0) == pytest.approx(2 * 100 * 180 / 1e7)
    assert SMALL.seconds(1, 0, 10, 0, before=1e-4) == SMALL.seconds(1, 0, 10, 0)
    assert SMALL.seconds(100, 0, 10, 0, before=1e-4) == pytest.approx(2 * 100 * 120 / 1e7 + 1e-4)
    assert on_cpu(SMALL, 64, 10, before=1e-4) == pytest.approx(on_cpu(SMALL, 64, 10) + 1e-4)


def test_rows_that_are_not_registered_go_slower_and_the_cpu_computes_none_beside():
    assert SMALL.seconds(1, 0, 10, 0, registered=False) == pytest.approx(480 / (0.13 * 1e6))
    slow = with_hardware(pcie_bandwidth=1e3)
    assert slow.seconds(1, 0, 10, 0, registered=False) == pytest.approx(480 / 1e3)
    cost = ColdPrefill(HardwareProfile.load(), small_spec(d_model=4096, d_ff=11008, dtype="bf16"))
    assert {cost.by_cpu(tokens, 3008, 8000, registered=False) for tokens in range(1, 600, 7)} == {0, 8000}


def test_hot_neurons_are_computed_beside_the_cpu():
    assert on_cpu(SMALL, 8, 1, hot=10_000) == pytest.approx(2 * 8 * 120_000 / 1e7 + RESUMED)
    assert SMALL.seconds(8, 10, 0, 0) == pytest.approx(2 * 8 * 120 / 1e7)
    assert with_hardware(gpu_gemm_flops=1e12).seconds(8, 10, 0, 0) == pytest.approx(480 / 1e7)


@pytest.mark.parametrize(("precision", "terms"), [("precise", 3), ("fast", 2)])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "int8", "f32"])
def test_tensor_cores_take_weights_of_16_bits_and_fewer_in_terms(dtype, precision, terms):
    spec = small_spec(d_model=128, d_ff=1000, dtype=dtype)
    cost = ColdPrefill(replace(HARDWARE, gpu_tensor_flops=6e7, gpu_read_bandwidth=1e12), spec, precision)
    rate = 1e7 if dtype == "f32" else PRODUCT_SHARE * 6e7 / terms
    assert cost.seconds(100, 10, 0, 0) == pytest.approx(2 * 100 * 10 * 3 * 128 / rate)
    assert with_hardware(cost, gpu_tensor_flops=0.0).seconds(100, 10, 0, 0) == pytest.approx(2 * 100 * 10 * 384 / 1e7)


@pytest.mark.parametrize("before", [0.0, 2e-3])
@pytest.mark.parametrize(("hot", "cold"), [(3008, 8000), (0, 11008), (10_960, 48), (11_008, 0)])
@pytest.mark.parametrize("flops", [4e11, 4e12, 4e13])
def test_a_layer_is_split_so_that_both_ways_end_together(hot, cold, before, flops):
    """Better than any other split, but for what the split in between costs the CPU's reading."""
    spec = small_spec(d_model=4096, d_ff=11008, dtype="bf16")
    cost = ColdPrefill(replace(HardwareProfile.load(), cpu_gemm_flops=flops), spec, few=32)
    for tokens in (9, 32, 33, 64, 512, 2048):
        found = cost.by_cpu(tokens, hot, cold, before)
        assert 0 <= found <= cold and (found % GROUP == 0 or found == cold)
        every = [*range(0, cold, GROUP), cold]
        least = min(cost.seconds(tokens, hot, cold, count, before) for count in every)
        assert cost.seconds(tokens, hot, cold, found, before) == pytest.approx(least, rel=1e-9)


def test_the_cpu_computes_less_the_more_tokens_there_are():
    spec = small_spec(d_model=4096, d_ff=11008, dtype="bf16")
    cost = ColdPrefill(replace(HardwareProfile.load(), cpu_gemm_flops=2e12), spec)
    shares = [cost.by_cpu(tokens, 3008, 8000) for tokens in (9, 32, 40, 52, 64, 128, 512)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 8000 and 0 < shares[4] < 8000 and not shares[-1]


def test_reading_for_the_cpu_is_slower_while_rows_are_sent():
    cost = with_hardware(cpu_gemm_flops=1e12, pcie_bandwidth=2e5)
    alone, beside = cost.cpu_neuron_seconds(64), cost.cpu_neuron_seconds(64, beside_pcie=True)
    assert beside == pytest.approx(alone / 0.8)
    most = with_hardware(cost, pcie_bandwidth=9e5).cpu_neuron_seconds(64, beside_pcie=True)
    assert most == pytest.approx(2 * alone)
