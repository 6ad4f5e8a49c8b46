"""Prefill's two ways for cold neurons: times worked out by hand, and which of them is chosen."""

import math
from dataclasses import replace

import pytest
from placement_cases import NO_GPU, ROUND_HARDWARE, small_spec

from placement.prefill import ColdPrefill
from profiler.common.hardware import HardwareProfile

# A neuron has 3 rows of 4 f32: 12 weights, 48 bytes.
HARDWARE = replace(ROUND_HARDWARE, cpu_gemm_flops=1e6, gpu_gemm_flops=1e7, pcie_host_bandwidth=5e5)
SMALL = ColdPrefill(HARDWARE, small_spec(d_ff=1000))


def exchange(tokens):
    return 1e-3 + 16 * tokens / 5e5 + 16 * tokens / 1e6


@pytest.mark.parametrize(("tokens", "passes"), [(1, 1), (8, 1), (9, 2), (16, 2)])
def test_few_tokens_read_the_rows_for_every_eight(tokens, passes):
    fast = replace(SMALL, hardware=replace(HARDWARE, cpu_gemm_flops=1e12))
    assert fast.cpu_seconds(tokens, 10) == pytest.approx(passes * 480 / 1e6 + exchange(tokens))
    slow = replace(SMALL, hardware=replace(HARDWARE, cpu_gemm_flops=1e3))
    assert slow.cpu_seconds(tokens, 10) == pytest.approx(2 * tokens * 120 / 1e3 + exchange(tokens))


def test_many_tokens_take_gemms_on_widened_rows():
    expected = (480 + 8 * 120) / 1e6 + 2 * 64 * 120 / 1e8
    fast_gemm = replace(SMALL, hardware=replace(HARDWARE, cpu_gemm_flops=1e8))
    assert fast_gemm.cpu_seconds(64, 10) == pytest.approx(expected + exchange(64))


def test_streaming_overlaps_with_the_products():
    assert SMALL.stream_seconds(1, 10) == pytest.approx(480 / 1e6)
    assert SMALL.stream_seconds(100, 10) == pytest.approx(2 * 100 * 120 / 1e7)
    assert SMALL.stream_seconds(100, 10, hot=5) == pytest.approx(2 * 100 * 180 / 1e7)


def test_hot_neurons_are_computed_beside_the_cpu():
    assert SMALL.cpu_seconds(8, 1, hot=10_000) == pytest.approx(2 * 8 * 120_000 / 1e7)
    assert SMALL.cpu_seconds(8, 0, hot=10) == SMALL.stream_seconds(8, 0, hot=10) == pytest.approx(2 * 8 * 120 / 1e7)
    reads = replace(SMALL, hardware=replace(HARDWARE, gpu_gemm_flops=1e12))
    assert reads.cpu_seconds(8, 0, hot=10) == pytest.approx(480 / 1e7)


def test_the_cheaper_way_changes_once_with_the_number_of_tokens():
    spec = small_spec(d_model=4096, d_ff=11008, dtype="bf16")
    cost = ColdPrefill(HardwareProfile.load(), spec)
    chosen = [cost.stream_is_cheaper(tokens, 8000, 3008) for tokens in range(1, 600)]
    assert not chosen[0] and chosen[-1] and chosen == sorted(chosen)
    for tokens in (1, 600):
        both = cost.cpu_seconds(tokens, 8000, 3008), cost.stream_seconds(tokens, 8000, 3008)
        assert cost.seconds(tokens, 8000, 3008) == min(both)


def test_without_a_gpu_nothing_is_streamed_nor_handed_over():
    alone = ColdPrefill(NO_GPU, small_spec())
    assert alone.stream_seconds(512, 10) == math.inf and not alone.stream_is_cheaper(512, 10)
    assert alone.cpu_seconds(1, 10) == pytest.approx(480 / 1e6)
