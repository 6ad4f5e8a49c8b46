"""Measuring a machine for its hardware profile: host memory, GPU kernels, PCIe and hand-off."""
