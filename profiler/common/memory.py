"""How much of the machine's memory this process may take."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def whole_memory() -> int:
    """Bytes of memory of the machine, or of the container where that has a limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):  # "max" where there is none
        found.append(int((_GROUP / "memory.max").read_text(encoding="ascii")))
    return min(found)


def free_memory() -> int:
    """Bytes of memory that this process may still take; 0 where the system does not say."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    if not found:
        with suppress(OSError, ValueError, AttributeError):  # no such figure: half of what there is
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    with suppress(OSError, ValueError):  # a container's own limit
        limit, used = ((_GROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=0)
