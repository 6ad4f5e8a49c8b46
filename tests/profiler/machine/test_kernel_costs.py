"""What is launched to cost the GPU's kernels: the bytes that are claimed, and that every launch reads other ones."""

import pytest
import torch
from gpu_cases import DEVICE

from profiler.common.hardware import GPU_KERNELS, HardwareProfile
from profiler.machine.kernel_costs import Case, Shape, all_cases, kernel_points, small_launches

SMALL = Shape(
    d=64,
    gemv_rows=(4, 12),
    weight_rows=24,
    heads=4,
    contexts=(4, 16),
    cached_tokens=32,
    block=8,
    neurons=16,
    ranks=(8, 24),
    predictor_bytes=12_000,
    active=(4, 8),
)


def test_every_kernel_is_measured_and_its_launches_run():
    claimed = {}
    for name, cases in all_cases(torch.device(DEVICE), SMALL):
        claimed[name] = []
        for case in cases:
            case.launches[0]()
            claimed[name].append((case.size, len(case.launches)))
    assert claimed.keys() == GPU_KERNELS.keys()
    assert claimed["gemv"] == [(4 * 64 * 2, 6), (12 * 64 * 2, 2)]
    assert claimed["attention"] == [(2 * 4 * 64 * 2, 4), (2 * 16 * 64 * 2, 2)]
    assert claimed["sparse_ffn"] == [(3 * 4 * 64 * 2, 4), (3 * 8 * 64 * 2, 2)]
    # int8 codes in rows of 128, a scale and a bias for each row.
    expected = [(rank + 16) * (128 + 8) for rank in (8, 24)]
    assert claimed["predictor"] == [(size, 12_000 // size) for size in expected]
    small_launches(torch.device(DEVICE), SMALL)[0]()


def test_all_active_neurons_fire_or_fewer_bytes_would_be_read():
    for name, cases in all_cases(torch.device(DEVICE), SMALL):
        for case in cases if name == "sparse_ffn" else ():
            case.launches[0]()
            hidden = case.launches[0].args[5]
            assert (hidden != 0).all() and hidden.shape[1] == case.launches[0].args[3].item()


def test_points_rise_with_size():
    times = {10: 2e-6, 20: 1.9e-6, 30: 3e-6}
    cases = [Case(size, [lambda s=size: times[s]]) for size in times]
    assert kernel_points(iter(cases), lambda launches: launches[0]()) == ((10.0, 2e-6), (20.0, 2e-6), (30.0, 3e-6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA GPU")
def test_measuring_this_machines_gpu_gives_a_plausible_profile(tmp_path):
    from profiler.machine.measure import measure_hardware

    found = measure_hardware()
    assert found.source == "measured" and found.has_gpu
    assert 50e9 < found.gpu_read_bandwidth < 50e12 and 1e9 < found.pcie_bandwidth < 1e12
    assert 0 < found.gpu_launch_seconds < found.handoff_seconds < 1e-2  # a wrong unit, not a busy machine
    assert found.gpu_kernels.keys() == GPU_KERNELS.keys()
    found.save(tmp_path / "h.json")
    assert HardwareProfile.load(tmp_path / "h.json") == found
