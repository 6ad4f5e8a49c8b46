"""The GPU's part of `measure_hardware`: its kernels' costs, the bus, and the hand-off between both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from profiler.common.hardware import HardwareProfile
from profiler.machine.handoff import Handoff
from profiler.machine.kernel_costs import (
    all_cases,
    gemv_cases,
    graph_seconds,
    kernel_points,
    replay_seconds,
    seconds_after_small,
    small_launches,
)
from profiler.machine.timing import WIDTH, Report, median_seconds

_PCIE_BYTES = 256 * 2**20
_FEW, _MANY = 100, 400  # active cold neurons of a layer
_GEMM_TOKENS = 1024
_TOKEN_KERNELS = 6  # times 64: the kernels of a step of 32 layers


def measure_gpu(cpu: HardwareProfile, report: Report) -> HardwareProfile:
    """`cpu` with GPU 0 added, measured in some 20 s, most of which compiles kernels; needs CUDA and triton."""
    device = torch.device("cuda", 0)
    report("GPU kernels: small ones")
    small = small_launches(device)
    token = replay_seconds(small * _TOKEN_KERNELS)
    points = {}
    for kernel, cases in all_cases(device):
        report(f"GPU kernels: {kernel}")
        points[kernel] = kernel_points(cases, partial(seconds_after_small, small=small[0]))
    largest = list(gemv_cases(device))[-1]
    read = graph_seconds(largest.launches)
    launch = max(0.0, seconds_after_small(largest.launches, small[0]) - read)
    report("PCIe and hand-off")
    to_gpu, to_host = pcie_bandwidths(device)
    handoff, layer, scattered = measure_handoff(device, cpu.cpu_threads)
    return replace(
        cpu,
        name=f"{torch.cuda.get_device_name(device)}, CPU threads: {cpu.cpu_threads}",
        gpu_read_bandwidth=largest.size / read,
        pcie_bandwidth=to_gpu,
        pcie_host_bandwidth=to_host,
        handoff_seconds=handoff,
        cpu_layer_seconds=layer,
        cpu_scattered_bandwidth=scattered,
        gpu_launch_seconds=launch,
        token_seconds=token,
        gpu_gemm_flops=gemm_flops(device, torch.float32),
        gpu_tensor_flops=gemm_flops(device, torch.bfloat16) if torch.cuda.is_bf16_supported(False) else 0.0,
        vram_bytes=torch.cuda.mem_get_info(device)[1],
        gpu_kernels=points,
    )


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of torch's product of 1024 tokens with a square matrix, of f32 or of bf16 summed in f32. Of random
    numbers, as a GPU's clock falls with the bits that change."""
    x, weight = (torch.randn(rows, WIDTH, device=device).to(dtype) for rows in (_GEMM_TOKENS, WIDTH))
    out = torch.empty(_GEMM_TOKENS, WIDTH, device=device)

    def product() -> None:
        if dtype == torch.float32:
            torch.mm(x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out_dtype=torch.float32, out=out)

    return 2.0 * _GEMM_TOKENS * WIDTH * WIDTH / _waited(product)


def pcie_bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes/s between pinned host memory and the GPU: to the GPU, to the host."""
    pinned = torch.ones(_PCIE_BYTES // 4).pin_memory()
    there = torch.empty(_PCIE_BYTES // 4, device=device)
    seconds = [_waited(lambda: there.copy_(pinned, non_blocking=True)), _waited(lambda: pinned.copy_(there, True))]
    return pinned.nbytes / seconds[0], pinned.nbytes / seconds[1]


def measure_handoff(device: torch.device, threads: int) -> tuple[float, float, float]:
    """Seconds that a hand-off adds to a decode step when nothing is asked for; seconds that a layer's cold neurons add
    however few they are; and the bytes/s at which `threads` CPU workers read them.

    Measured as the step asks: a request a layer, the workers polling in between. Calls one after another, without the
    GPU, read up to twice as fast on a shared host.
    """
    with Handoff(device, threads) as handoff:
        empty, few, many = (handoff.seconds(count) for count in (0, _FEW, _MANY))
        size = handoff.neuron_bytes
    each = max(many - few, 1e-9) / (_MANY - _FEW)
    return empty, max(few - empty - _FEW * each, 0.0), size / each


def _waited(work: Callable[[], object]) -> float:
    """Median seconds of `work` and of waiting for the GPU."""

    def run(_: int) -> None:
        work()
        torch.cuda.synchronize()

    return median_seconds(run)
