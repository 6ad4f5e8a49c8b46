"""Measuring a machine: plausible figures on this one, and what is made of a GPU's."""

import threading

import numpy as np
import pytest
import torch

from cpu_kernels.worker_pool import WorkerPool
from profiler.common.hardware import HardwareProfile
from profiler.machine import cpu, measure, timing
from profiler.machine.measure import measure_hardware


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("WIDTH", 128), ("_NEURONS", 256), ("PRODUCT_TOKENS", 16), ("_GEMM_ROWS", 8)):
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(timing, "_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("threads", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (15, [1, 2, 4, 8, 15]), (16, [1, 2, 4, 8, 16])]
)
def test_thread_counts(threads, expected):
    assert cpu.thread_counts(threads) == expected


def test_a_machine_without_a_gpu(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "available_cpus", lambda: 2)
    said = []
    found = measure_hardware(said.append)
    assert said == ["host memory, 1 thread", "host memory, 2 threads", "host arithmetic"]
    assert found.source == "measured" and not found.has_gpu and found.cpu_threads == 2
    assert [row[0] for row in found.cpu_bandwidths] == [1, 2]
    # Any machine reads between 1 MB/s and 100 TB/s: this catches a wrong unit, not a slow machine.
    for bandwidth in (*found.cpu_bandwidths[0][1:], found.cpu_read_bandwidth, found.scattered_bandwidth):
        assert 1e6 < bandwidth < 1e14
    for flops in (found.cpu_gemm_flops, found.cpu_fast_gemm_flops):
        assert 1e6 < flops < 1e15
    assert 0 <= found.cpu_panel_tokens <= 960
    assert found.gpu_gemm_flops == found.gpu_tensor_flops == 0 <= found.cpu_layer_seconds < 1
    found.save(tmp_path / "h.json")
    assert HardwareProfile.load(tmp_path / "h.json") == found


def test_scattered_bandwidth_counts_the_bytes_of_the_rows(monkeypatch):
    """A pass of 64 neurons takes 1 s and one of 256 takes 2: 192 neurons of three rows of 256 bytes in that second."""
    calls = []

    def fake_seconds(work, seconds=None):
        work(0)
        return calls[-1] / 192 + 2 / 3

    def fake_ffn(ffn, x, rows, offsets, out, scratch, pool):
        assert (np.diff(rows) > 0).all() and rows.max() < 1024 and offsets.tolist() == [0, len(rows)]
        calls.append(len(rows))

    monkeypatch.setattr(cpu, "median_seconds", fake_seconds)
    monkeypatch.setattr(cpu, "sparse_ffn", fake_ffn)
    weights = np.full((3 * 1024, 128), 0x3C00, np.uint16)
    assert cpu.scattered_bandwidth(weights, WorkerPool(1)) == pytest.approx(192 * 3 * 256)
    assert calls == [64, 256]


@pytest.mark.parametrize("panels", [0.0, 16.0, 70.0, 448.0])
def test_panel_tokens_from_the_time_of_few_tokens(panels, monkeypatch):
    """Where a token takes 1 ms and panels those of `panels`, 512 tokens have the rate of both together."""
    weights = np.full((1024, 128), 0x3C00, np.uint16)
    monkeypatch.setattr(cpu, "_gemm_seconds", lambda matrix, tokens, *given: 1e-3 * (tokens + panels))
    fast = 2.0 * 512 * weights.size / (1e-3 * (512 + panels))
    assert cpu.panel_tokens(weights, WorkerPool(1), fast) == pytest.approx(panels)


def test_ctrl_c_leaves_no_worker(quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "available_cpus", lambda: 2)

    def interrupted(weights, pool):
        if pool.threads == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(cpu, "read_bandwidth", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        measure_hardware()
    assert threading.active_count() == before


def test_median_of_at_least_three_runs_after_one_that_does_not_count():
    runs = []
    assert timing.median_seconds(runs.append, 0.0) < 1
    assert runs == [0, 0, 1, 2]


def test_measured_profile_of_the_cpu_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(cpu, "_PROBE_SECONDS", 0.0)
    profile = cpu.probe_cpu()
    assert profile.source == "measured" and not profile.has_gpu
    # Any machine reads between 10 MB/s and 100 TB/s: this catches a wrong unit, not a slow machine.
    assert 1e7 < profile.cpu_read_bandwidth < 1e14
    profile.save(tmp_path / "hardware.json")
    assert HardwareProfile.load(tmp_path / "hardware.json") == profile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_of_a_gpu():
    from profiler.machine.gpu import gemm_flops

    device = torch.device("cuda", 0)
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e11 < gemm_flops(device, dtype) < 1e16
