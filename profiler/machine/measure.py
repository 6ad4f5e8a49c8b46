"""`measure_hardware`: this machine's `HardwareProfile`, in under a minute, by the kernels that run the model."""

from __future__ import annotations

import torch

from cpu_kernels.worker_pool import available_cpus
from profiler.common.hardware import HardwareProfile
from profiler.machine.cpu import measure_cpu
from profiler.machine.timing import Report


def measure_hardware(report: Report = lambda text: None) -> HardwareProfile:
    """Measure the CPU and, where torch finds CUDA, GPU 0; `report` is told what comes next. Some 60 s at most.

    Without a GPU its fields are 0. Takes 403 MB of host memory, and up to 2 GiB of the GPU's.
    """
    if not torch.cuda.is_available():
        return measure_cpu(available_cpus(), report)
    from profiler.machine.gpu import measure_gpu  # needs triton, which a machine without a GPU may lack

    return measure_gpu(measure_cpu(max(1, available_cpus() - 1), report), report)
