"""Measuring speed against the ceiling that memory sets, and beside peers."""
