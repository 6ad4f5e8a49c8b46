"""`hybrid doctor`: this machine, and what would be used and why."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import click
import torch
from llvmlite import binding

from cpu_kernels.tile_unit import tiles_usable
from cpu_kernels.worker_pool import available_cpus
from hybrid.console import counted, details, size
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.model.loader import ModelFolder
from hybrid.runtime.devices import free_bytes
from hybrid.runtime.plan import plan_run
from profiler.common.artifact import package_version
from profiler.machine.cpu import probe_cpu

_CPU_FEATURES = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512bf16", "amx-bf16")
_PACKAGES = ("torch", "numpy", "numba", "llvmlite", "scipy", "scikit-learn", "safetensors", "tokenizers", "triton")


def doctor(model: Path | None) -> None:
    """Print the machine, the versions and the choices that follow from them."""
    rows = [*_cpu_rows(), *_gpu_rows(), *_version_rows(), *_choice_rows(model)]
    click.echo(details(f"hybrid {package_version()}", rows))


def _cpu_rows() -> list[tuple[str, str]]:
    features = binding.get_host_cpu_features()
    found = [name for name in _CPU_FEATURES if features.get(name)]
    measured = probe_cpu()
    return [
        ("CPU", f"{platform.machine()}, {binding.get_host_cpu_name()}"),
        ("vector features", ", ".join(found) or "none of those used"),
        *([("tile unit", _tile_unit())] if features.get("amx-bf16") else []),
        ("cores", f"{os.cpu_count()} in the machine, {available_cpus()} for this process"),
        ("memory read", f"{measured.cpu_read_bandwidth / 1e9:.1f} GB/s by {counted(measured.cpu_threads, 'thread')}"),
    ]


def _tile_unit() -> str:
    """Of a CPU with amx-bf16, whether it is used."""
    return "multiplies prompts" if tiles_usable() else "not used: the system does not let this process"


def _gpu_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "the driver shows no GPU"
        return [("GPU", f"none usable: {why}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        rows.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {size(free)} free of {size(total)}"))
    return rows


def _version_rows() -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed" + (" (needed on a GPU only)" if name == "triton" else "")))
    return rows


def _choice_rows(model: Path | None) -> list[tuple[str, str]]:
    """What the chat would choose for the model, as its banner says it."""
    plan = plan_run(ModelFolder.open(model or EMBEDDED_MODEL))
    gpu = f"; at most {size(free_bytes(plan.gpu))} of the GPU without --vram-budget" if plan.gpu else ""
    rows = [
        (f"{model or 'embedded model'}", f"{plan.summary()}{gpu}"),
        *(("note", notice) for notice in plan.notices),
        ("kernels", "Numba for this CPU, Triton for a GPU, compiled on first use and cached"),
    ]
    return rows
