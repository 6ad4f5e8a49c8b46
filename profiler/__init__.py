"""Offline profiling: calibration batches, activation recording, hardware measurement."""
