"""`ServingConfig`: how many sequences are served at once and what they share, checked when built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid.errors import InputError
from hybrid.runtime.config import MOST_KV_TOKENS
from hybrid.runtime.plan import RunPlan
from profiler.common.memory import free_memory

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
