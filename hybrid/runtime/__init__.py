"""What answers: the engine, its decode step on the CPU, sampling, and the choice of device and placement."""

from profiler.common.openmp import passive_waits

with passive_waits():  # before any file of this room imports torch for itself
    import torch  # noqa: F401
