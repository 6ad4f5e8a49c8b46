"""Numba CPU kernels: arrays in, arrays out; they import nothing else of this project."""
