"""`HardwareProfile`: what the cost model needs to know of a machine, as a small JSON file.

A profile is measured on the machine that will run the model, by `measure_hardware`, or written by hand for one that
is not here. By hand the numbers of a data sheet do: what has a default below may be left out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from profiler.common.artifact import atomic_write
from profiler.common.errors import InputError

DEFAULT_PROFILE = Path(__file__).with_name("default_hardware.json")
FORMAT_VERSION = 3
MEASURE = "hybrid hardware -o FILE"
# Kernels of the GPU's decode step that read weights or keys and values, with how many launches each counts: its own and
# the small kernel before it, such as a norm.
GPU_KERNELS = {"gemv": 2, "attention": 3, "predictor": 3, "sparse_ffn": 3}

PRODUCT_TOKENS = 512  # of the products whose rates a profile holds
_WHOLE = ("cpu_threads", "vram_bytes")


@dataclass(frozen=True)
class HardwareProfile:
    """Bandwidths in bytes/s, times in seconds, sizes in bytes; `InputError` when a value makes no sense.

    name: shown to the user and recorded in the placement.
    source: `measured` on this machine, or `default` when the numbers are taken from data sheets.
    cpu_threads: worker threads that reached the bandwidths; beside a GPU all cores but the one that waits for it.
    cpu_read_bandwidth: weights read from host memory by all threads together, one row after another.
    gpu_read_bandwidth: weights read from GPU memory by one kernel; 0 means that there is no GPU.
    pcie_bandwidth: pinned host memory to GPU memory.
    handoff_seconds: handing a layer's FFN from the GPU to the CPU workers and back, with nothing to compute.
    gpu_launch_seconds: one more small kernel inside a CUDA graph, after one that reads weights.
    cpu_layer_seconds: what a layer's FFN takes the CPU workers beside reading its rows.
    vram_bytes: memory of the GPU.
    pcie_host_bandwidth: GPU memory to pinned host memory; 0 stands for `pcie_bandwidth`.
    cpu_scattered_bandwidth: rows of neurons here and there in host memory; 0 stands for `cpu_read_bandwidth`.
    token_seconds: starting a token's CUDA graph and waiting for its end, beside its kernels.
    cpu_gemm_flops: operations/s, two for a multiply and add, of products of `PRODUCT_TOKENS` tokens with bf16 weights,
        by all threads; cpu_fast_gemm_flops: the same as prefill `fast` has them; 0 stands for `cpu_gemm_flops`.
    cpu_panel_tokens: so many tokens' products take as long as bringing the weights out of memory into panels, once for
        all tokens.
    gpu_gemm_flops: of a large f32 product; gpu_tensor_flops: of one of bf16 summed in f32, 0 where it was not measured.
    cpu_bandwidths: (threads, read, scattered) for other numbers of threads, rising; see `with_threads`.
    gpu_kernels: of a kernel of `GPU_KERNELS` and the small one before it (bytes read, seconds in a CUDA graph), rising;
        see `kernel_seconds`.
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
    pcie_host_bandwidth: float = 0.0
    cpu_scattered_bandwidth: float = 0.0
    token_seconds: float = 0.0
    cpu_gemm_flops: float = 3e11
    gpu_gemm_flops: float = 3e13
    cpu_fast_gemm_flops: float = 0.0
    gpu_tensor_flops: float = 0.0
    cpu_panel_tokens: float = 16.0
    cpu_bandwidths: tuple[tuple[int, float, float], ...] = ()
    gpu_kernels: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"hardware profile: name is {self.name!r}, expected a text; correct it")
        if self.source not in ("default", "measured"):
            raise InputError(f"hardware profile: source is {self.source!r}, expected default or measured; correct it")
        above_zero = {"cpu_threads", "cpu_read_bandwidth", "cpu_gemm_flops"}
        if self.has_gpu:
            above_zero |= {"pcie_bandwidth", "vram_bytes", "gpu_gemm_flops"}
        for entry in fields(self)[2:-2]:
            _check_number(entry.name, getattr(self, entry.name), entry.name in _WHOLE, entry.name in above_zero)
        if self.vram_bytes and not self.has_gpu:
            raise InputError("hardware profile: vram_bytes without gpu_read_bandwidth; give both, or 0 for no GPU")
        # Lists, as JSON has them, become what the fields say.
        object.__setattr__(self, "cpu_bandwidths", _points("cpu_bandwidths", self.cpu_bandwidths, 3))
        object.__setattr__(self, "gpu_kernels", _kernel_points(self.gpu_kernels))

    @property
    def has_gpu(self) -> bool:
        return self.gpu_read_bandwidth != 0

    @property
    def scattered_bandwidth(self) -> float:
        """Bytes/s of rows here and there in host memory, by all threads."""
        return self.cpu_scattered_bandwidth or self.cpu_read_bandwidth

    @property
    def host_bandwidth(self) -> float:
        """Bytes/s from GPU memory to pinned host memory."""
        return self.pcie_host_bandwidth or self.pcie_bandwidth

    def kernel_seconds(self, kernel: str, size: np.ndarray) -> np.ndarray:
        """Seconds that `kernel` of `GPU_KERNELS` and a small one before it take in a CUDA graph to read `size` bytes.

        Elementwise. Linear between measured points, as long as the smallest below it, and at `gpu_read_bandwidth`
        beyond the largest; where it was not measured, its launches and its bytes at that bandwidth.
        """
        if kernel not in self.gpu_kernels:
            return GPU_KERNELS[kernel] * self.gpu_launch_seconds + size / self.gpu_read_bandwidth
        sizes, seconds = np.array(self.gpu_kernels[kernel]).T
        return np.interp(size, sizes, seconds) + np.maximum(size - sizes[-1], 0) / self.gpu_read_bandwidth

    def with_threads(self, threads: int) -> HardwareProfile:
        """This machine with so many worker threads: bandwidths linear between those of `cpu_bandwidths`.

        Beyond the most threads measured they stay, below the fewest they fall in proportion; products do so below
        `cpu_threads`. Raises `InputError` below 1.
        """
        share = max(1, min(threads, self.cpu_threads)) / self.cpu_threads
        own = (self.cpu_threads, self.cpu_read_bandwidth, self.scattered_bandwidth)
        others = [row for row in self.cpu_bandwidths if row[0] != self.cpu_threads]
        counts, read, scattered = np.array([(0, 0, 0), *sorted([own, *others])]).T
        return replace(
            self,
            cpu_threads=threads,
            cpu_read_bandwidth=float(np.interp(threads, counts, read)),
            cpu_scattered_bandwidth=float(np.interp(threads, counts, scattered)),
            cpu_gemm_flops=share * self.cpu_gemm_flops,
            cpu_fast_gemm_flops=share * self.cpu_fast_gemm_flops,
        )

    @classmethod
    def load(cls, path: Path = DEFAULT_PROFILE) -> HardwareProfile:
        """Read a profile; without a path, the one shipped here: a 24 GB card on PCIe 4 beside 8 CPU threads.

        Raises `InputError` when the file is missing, is not JSON, is of another format version, or has a missing,
        unknown or senseless field.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read hardware profile {path}: {reason}; expected a JSON file") from error
        known = [entry.name for entry in fields(cls)]
        if not isinstance(values, dict):
            raise InputError(f"{path} holds a {type(values).__name__}, expected an object with: {', '.join(known)}")
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            found = "no format version" if version is None else f"format version {version!r}"
            raise InputError(f"{path} has {found}, this build reads {FORMAT_VERSION}; measure again with: {MEASURE}")
        needed = {entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING}
        for problem, names in (("lacks", needed - values.keys()), ("has unknown", values.keys() - set(known))):
            if names:
                raise InputError(f"{path} {problem} {', '.join(sorted(names))}; known are: {', '.join(known)}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The profile as its file holds it, in JSON's types."""
        return json.loads(json.dumps({"version": FORMAT_VERSION} | asdict(self)))

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically; raises `ArtifactError` when the folder cannot be written."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_json(), indent=2) + "\n").encode())


def _check_number(name: str, value: object, whole: bool, above_zero: bool) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (above_zero and value == 0):  # type: ignore[arg-type, operator]
        expected = f"{'a whole' if whole else 'a'} number {'above 0' if above_zero else 'of at least 0'}"
        raise InputError(f"hardware profile: {name} is {value!r}, expected {expected}; correct it")


def _points(name: str, rows: Any, width: int) -> tuple[Any, ...]:
    """`rows` as tuples of `width` numbers, the first of which rises from row to row."""
    if not isinstance(rows, list | tuple) or not all(isinstance(r, list | tuple) and len(r) == width for r in rows):
        raise InputError(f"hardware profile: {name} is {rows!r}, expected a list of lists of {width} numbers")
    for row in rows:
        for position, value in enumerate(row):
            _check_number(name, value, whole=position == 0 and width == 3, above_zero=position > 0 or width == 3)
    if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(rows)):
        raise InputError(f"hardware profile: {name} is {rows!r}, expected rows in rising order; correct it")
    return tuple(tuple(row) for row in rows)


def _kernel_points(kernels: Any) -> dict[str, tuple[tuple[float, float], ...]]:
    if not isinstance(kernels, Mapping) or not kernels.keys() <= GPU_KERNELS.keys():
        raise InputError(f"hardware profile: gpu_kernels is {kernels!r}, expected some of {', '.join(GPU_KERNELS)}")
    for name, rows in kernels.items():
        if not rows:
            raise InputError(f"hardware profile: gpu_kernels has nothing for {name}; leave it out or measure it")
    return {name: _points(f"gpu_kernels {name}", rows, 2) for name, rows in kernels.items()}
