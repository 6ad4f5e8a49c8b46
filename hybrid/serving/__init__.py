"""Serving many answers at once: the scheduler over one step for many rows, shared prefixes, `AsyncEngine`."""
