"""`HardwareProfile`: what the cost model needs to know of a machine, as a small JSON file.

A profile is measured on the machine that will run the model, or written by hand for one that is not here.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from cpu_kernels.bandwidth import BUFFER_BYTES, read_bandwidth
from cpu_kernels.worker_pool import WorkerPool
from profiler.artifact import atomic_write
from profiler.errors import InputError

DEFAULT_PROFILE = Path(__file__).with_name("default_hardware.json")

_PROBE_BYTES = BUFFER_BYTES
_PROBE_SECONDS = 0.3
_GPU_PROBE_BYTES = 2**30
_PCIE_PROBE_BYTES = 256 * 2**20
_GRAPH_KERNELS = 200


@dataclass(frozen=True)
class HardwareProfile:
    """Bandwidths in bytes/s, times in seconds, sizes in bytes; `InputError` when a value makes no sense.

    name: shown to the user and recorded in the placement.
    source: `measured` on this machine, or `default` when the numbers are taken from data sheets.
    cpu_threads: worker threads that reached `cpu_read_bandwidth`.
    cpu_read_bandwidth: weights read from host memory by all threads together.
    gpu_read_bandwidth: weights read from GPU memory by one kernel; 0 means that there is no GPU.
    pcie_bandwidth: pinned host memory to GPU memory, one direction.
    handoff_seconds: handing a layer's FFN from the GPU to the CPU workers and back, with nothing to compute.
    gpu_launch_seconds: one more small kernel inside a CUDA graph.
    cpu_layer_seconds: waking and joining the CPU workers for one layer.
    vram_bytes: memory of the GPU.
    """

    name: str
    source: Literal["default", "measured"]
    cpu_threads: int
    cpu_read_bandwidth: float
    gpu_read_bandwidth: float
    pcie_bandwidth: float
    handoff_seconds: float
    gpu_launch_seconds: float
    cpu_layer_seconds: float
    vram_bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"hardware profile: name is {self.name!r}, expected a text; correct it")
        if self.source not in ("default", "measured"):
            raise InputError(f"hardware profile: source is {self.source!r}, expected default or measured; correct it")
        above_zero = {"cpu_threads", "cpu_read_bandwidth"}
        if self.has_gpu:
            above_zero |= {"pcie_bandwidth", "vram_bytes"}
        for field in fields(self)[2:]:
            whole = field.name in ("cpu_threads", "vram_bytes")
            self._check_number(field.name, whole, above_zero=field.name in above_zero)
        if self.vram_bytes and not self.has_gpu:
            raise InputError("hardware profile: vram_bytes without gpu_read_bandwidth; give both, or 0 for no GPU")

    def _check_number(self, name: str, whole: bool, above_zero: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            expected = f"{'a whole' if whole else 'a'} number {'above 0' if above_zero else 'of at least 0'}"
            raise InputError(f"hardware profile: {name} is {value!r}, expected {expected}; correct it")

    @property
    def has_gpu(self) -> bool:
        return self.gpu_read_bandwidth != 0

    @classmethod
    def load(cls, path: Path = DEFAULT_PROFILE) -> HardwareProfile:
        """Read a profile; without a path, the one shipped here: a 24 GB card on PCIe 4 beside 8 CPU threads.

        Raises `InputError` when the file is missing, is not JSON, or has a missing, unknown or senseless field.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read hardware profile {path}: {reason}; expected a JSON file") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise InputError(f"{path} holds a {type(values).__name__}, expected an object with: {', '.join(known)}")
        for problem, names in (("lacks", set(known) - set(values)), ("has unknown", set(values) - set(known))):
            if names:
                raise InputError(f"{path} {problem} {', '.join(sorted(names))}; expected exactly: {', '.join(known)}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically; raises `ArtifactError` when the folder cannot be written."""
        with atomic_write(path) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())


def measure_cpu() -> HardwareProfile:
    """Measure how fast all threads read host memory (about a second, 512 MiB); the profile has no GPU."""
    pool = WorkerPool()
    threads, bandwidth = pool.threads, read_bandwidth(pool, _PROBE_BYTES, _PROBE_SECONDS)
    pool.close()
    return HardwareProfile(
        name=platform.processor() or platform.machine() or "CPU",
        source="measured",
        cpu_threads=threads,
        cpu_read_bandwidth=bandwidth,
        gpu_read_bandwidth=0.0,
        pcie_bandwidth=0.0,
        handoff_seconds=0.0,
        gpu_launch_seconds=0.0,
        cpu_layer_seconds=HardwareProfile.load().cpu_layer_seconds,
        vram_bytes=0,
    )


def measure_gpu() -> HardwareProfile:
    """Measure CPU and GPU 0 in about 3 s, the GPU with torch's kernels and copies; needs CUDA.

    The hand-off is a copy of 16 KB to the host, a synchronisation and a copy back, which a runtime whose CPU workers
    watch host memory will beat: hybrid layers look a little more expensive than they will be.
    """
    cpu, device = measure_cpu(), torch.device("cuda", 0)
    free, total = torch.cuda.mem_get_info(device)
    on_gpu = torch.ones(min(_GPU_PROBE_BYTES, free // 4) // 4, device=device)
    pinned = torch.ones(_PCIE_PROBE_BYTES // 4).pin_memory()
    vector, mirror = torch.ones(4096, device=device), torch.ones(4096).pin_memory()
    target = on_gpu[: len(pinned)]

    def hand_off() -> None:
        mirror.copy_(vector, non_blocking=True)
        torch.cuda.synchronize()
        vector.copy_(mirror, non_blocking=True)

    return replace(
        cpu,
        name=f"{torch.cuda.get_device_name(device)}, {cpu.cpu_threads} CPU threads",
        gpu_read_bandwidth=on_gpu.nbytes / _fastest(on_gpu.sum),
        pcie_bandwidth=pinned.nbytes / _fastest(lambda: target.copy_(pinned, non_blocking=True)),
        handoff_seconds=_fastest(hand_off),
        gpu_launch_seconds=_launch_seconds(vector),
        vram_bytes=total,
    )


def _fastest(work: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of the fastest of several runs, each waited for; other programs can only slow one down."""
    fastest = math.inf
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _launch_seconds(vector: torch.Tensor) -> float:
    """Seconds that one more small kernel adds to a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    vector.mul_(1.0)  # outside of the graph first, as capture may not load code
    with torch.cuda.graph(graph):
        for _ in range(_GRAPH_KERNELS):
            vector.mul_(1.0)
    return _fastest(graph.replay) / _GRAPH_KERNELS
