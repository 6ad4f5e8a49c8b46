"""`ServingConfig`: how many sequences are served at once and what they share, checked when built."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hybrid.errors import InputError
from hybrid.runtime.config import MOST_KV_TOKENS
from hybrid.runtime.plan import RunPlan

_MEMORY_SHARE = 4  # of the memory that is free, the KV pool takes one part in so many
_MOST = 2**16  # sequences or requests
_LONGEST_PAUSE = 3600.0


@dataclass(frozen=True)
class ServingConfig:
    """How to serve; checked when built, raising `InputError`.

    kv_tokens: tokens that all sequences have together, in blocks that they share. By default, on the CPU, as many as a
    quarter of the free memory holds, at least one context and at most `max_running` of them; beside a GPU one context,
    which is what placements are made for. max_pause: seconds that reading a prompt may hold up the tokens of others.
    max_running: sequences that are decoded at once. max_waiting: requests that may wait. reuse_prefixes: keep the keys
    and values of what was read for requests that begin alike.
    """

    kv_tokens: int | None = None
    max_pause: float = 0.1
    max_running: int = 32
    max_waiting: int = 256
    reuse_prefixes: bool = True

    def __post_init__(self) -> None:
        for name, value, most in (
            ("kv_tokens", self.kv_tokens, MOST_KV_TOKENS),
            ("max_running", self.max_running, _MOST),
            ("max_waiting", self.max_waiting, _MOST),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most):
                raise InputError(f"{name} is {value!r}, expected a whole number, 1 to {most}", setting=name)
        pause = self.max_pause
        is_number = isinstance(pause, int | float) and not isinstance(pause, bool) and math.isfinite(pause)
        if not is_number or not 0 < pause <= _LONGEST_PAUSE:
            expected = f"expected seconds, more than 0, at most {_LONGEST_PAUSE:.0f}"
            raise InputError(f"max_pause is {pause!r}, {expected}", setting="max_pause")


def pool_tokens(serving: ServingConfig, plan: RunPlan, free: int | None = None) -> int:
    """Tokens that the KV pool of `plan` has room for; free: bytes of memory that are, by default what the system says.

    Beside a GPU that is what was planned for.
    """
    if plan.gpu is not None:
        return plan.kv_tokens or plan.context
    if serving.kv_tokens is not None:
        return serving.kv_tokens
    share = (free_memory() if free is None else free) // _MEMORY_SHARE
    fits = share // max(1, plan.spec.n_layers * plan.spec.kv_bytes_per_layer(1))
    return min(max(fits, plan.context), serving.max_running * plan.context)


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
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=0)
