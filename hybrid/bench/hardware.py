"""`hybrid hardware`: measures this machine, and shows a hardware profile in units that people use."""

from __future__ import annotations

from pathlib import Path

import click

from hybrid.console import details, size, table
from hybrid.errors import InputError
from profiler.common.hardware import HardwareProfile
from profiler.machine.measure import measure_hardware

_GB, _TERA, _MICRO = 1e9, 1e12, 1e-6


def hardware(output: Path) -> None:
    """Measure this machine, print what was found and write it to `output`."""
    if output.is_dir():
        raise InputError(f"{output} is a folder; name the file to write with -o")
    found = measure_hardware(hardware_progress)
    click.echo(hardware_report(found))
    found.save(output)
    click.echo(f"wrote {output}; plan for it with: hybrid place --hardware {output}", err=True)


def hardware_progress(text: str) -> None:
    """Says what is being measured."""
    click.echo(f"hardware: {text}", err=True)


def hardware_report(found: HardwareProfile) -> str:
    """Every figure of a hardware profile."""
    gpu = _gpu_tables(found) if found.has_gpu else ["GPU: none usable, so only the host was measured"]
    return "\n\n".join([f"{found.name} ({found.source})", *_host_tables(found), *gpu])


def _host_tables(found: HardwareProfile) -> list[str]:
    counts = [[str(n), f"{read / _GB:.1f}", f"{few / _GB:.1f}"] for n, read, few in found.cpu_bandwidths]
    fixed = [
        ("fixed cost of a layer", f"{found.cpu_layer_seconds / _MICRO:.1f} us"),
        ("products of prompts", f"{found.cpu_gemm_flops / _TERA:.2f} Tflop/s"),
        ("the same, fast", f"{found.cpu_fast_gemm_flops / _TERA:.2f} Tflop/s" if found.cpu_fast_gemm_flops else "-"),
    ]
    return [table(["threads", "GEMV, GB/s", "sparse FFN, GB/s"], counts), details("host", fixed)]


def _gpu_tables(found: HardwareProfile) -> list[str]:
    rows = [
        ("memory", size(found.vram_bytes)),
        ("read", f"{found.gpu_read_bandwidth / _TERA:.2f} TB/s"),
        ("f32 products", f"{found.gpu_gemm_flops / _TERA:.1f} Tflop/s"),
        ("bf16 products", f"{found.gpu_tensor_flops / _TERA:.1f} Tflop/s" if found.gpu_tensor_flops else "-"),
        ("one more small kernel", f"{found.gpu_launch_seconds / _MICRO:.2f} us"),
        ("starting a token's graph", f"{found.token_seconds / _MICRO:.1f} us"),
        ("PCIe", f"{found.pcie_bandwidth / _GB:.1f} GB/s to the GPU, {found.host_bandwidth / _GB:.1f} GB/s back"),
        ("hand-off, empty", f"{found.handoff_seconds / _MICRO:.1f} us"),
    ]
    kernels = [
        [name, size(int(count)), f"{seconds / _MICRO:.1f}", f"{count / seconds / _TERA:.2f}"]
        for name, points in found.gpu_kernels.items()
        for count, seconds in points
    ]
    return [details("GPU", rows), table(["kernel in a graph", "reads", "us", "TB/s"], kernels)]
