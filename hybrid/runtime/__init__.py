"""What answers: the engine, its decode step on the CPU, sampling, and the choice of device and placement."""

from profiler.common.openmp import short_spins

with short_spins():  # before any file of this room imports torch for itself
    import torch  # noqa: F401
