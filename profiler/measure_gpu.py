"""The GPU's part of `measure_hardware`: its kernels' costs, the bus, and the hand-off between both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from profiler.handoff import Handoff
from profiler.hardware import HardwareProfile
from profiler.kernel_costs import all_cases, graph_seconds, kernel_points, replay_seconds, small_launches
from profiler.measure_hardware import Report, gemm_flops, median_seconds

_PCIE_BYTES = 256 * 2**20
_TOKEN_KERNELS = 6  # times 64: the kernels of a step of 32 layers


def measure_gpu(cpu: HardwareProfile, report: Report) -> HardwareProfile:
    """`cpu` with GPU 0 added, measured in some 20 s, most of which compiles kernels; needs CUDA and triton."""
    device = torch.device("cuda", 0)
    report("GPU kernels: small ones")
    small = small_launches(device)
    launch, token = graph_seconds(small), replay_seconds(small * _TOKEN_KERNELS)
    points = {}
    for kernel, cases in all_cases(device):
        report(f"GPU kernels: {kernel}")
        points[kernel] = kernel_points(cases, graph_seconds)
    largest, seconds = points["gemv"][-1]
    report("PCIe and hand-off")
    to_gpu, to_host = pcie_bandwidths(device)
    return replace(
        cpu,
        name=f"{torch.cuda.get_device_name(device)}, {cpu.cpu_threads} CPU threads",
        gpu_read_bandwidth=largest / seconds,
        pcie_bandwidth=to_gpu,
        pcie_host_bandwidth=to_host,
        handoff_seconds=measure_handoff(device, cpu.cpu_threads),
        gpu_launch_seconds=launch,
        token_seconds=token,
        gpu_gemm_flops=gemm_flops(device),
        vram_bytes=torch.cuda.mem_get_info(device)[1],
        gpu_kernels=points,
    )


def pcie_bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes/s between pinned host memory and the GPU: to the GPU, to the host."""
    pinned = torch.ones(_PCIE_BYTES // 4).pin_memory()
    there = torch.empty(_PCIE_BYTES // 4, device=device)
    seconds = [_waited(lambda: there.copy_(pinned, non_blocking=True)), _waited(lambda: pinned.copy_(there, True))]
    return pinned.nbytes / seconds[0], pinned.nbytes / seconds[1]


def measure_handoff(device: torch.device, threads: int) -> float:
    """Seconds that one hand-off without active neurons adds to a decode step: the mailbox's norm and request, an empty
    answer of `threads` CPU workers, and the sum with the next norm."""
    with Handoff(device, threads) as handoff:
        return handoff.seconds()


def _waited(work: Callable[[], object]) -> float:
    """Median seconds of `work` and of waiting for the GPU."""

    def run(_: int) -> None:
        work()
        torch.cuda.synchronize()

    return median_seconds(run)
