"""Triton GPU kernels, of the same verbs as cpu_kernels."""
