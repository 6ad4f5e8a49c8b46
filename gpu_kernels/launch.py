"""How kernels of a decode step are launched: each while the one before it still runs (programmatic dependent launch).

Launching a kernel after the last program of its predecessor has ended costs one to two microseconds, and a layer has
a dozen kernels. So every kernel here calls `begin` and is launched with `options`: the GPU then starts programs as soon
as all those of its predecessor have started, and they wait in `begin` until that one is complete and what it wrote is
visible.

Correctness rests on one rule: every kernel launched with `options` calls `begin` in every program, before it reads
anything that a kernel writes, and before it writes anything. A kernel is then complete only after its predecessor is,
and so after all before that, and nobody overwrites what an earlier kernel still reads. Only weights, which no kernel
writes, may be read before `begin`, and what earlier steps left in the KV cache: programs that wait have their first
weights on the way to registers meanwhile. What is launched without the option, such as torch's own kernels and copies,
waits for all before it, as always, and the next kernel waits for it; so what a step's first copies bring, such as
positions, may be read early too.

Triton's interpreter and GPUs before compute capability 9.0 have no such launches: there `begin` does nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.interpreter import InterpretedFunction

# False launches every kernel after its predecessor has ended: for measuring, and read at each launch, so that a graph
# keeps what it was captured with. Results are the same.
PDL = True


def own_cache() -> tempfile.TemporaryDirectory[str] | None:
    """A folder of this process for what Triton compiles, where its own cannot be written; kept as long as it is held.

    Every start then compiles: time, but no error. None where Triton's own will do, or no other can be made.
    """
    folder = os.path.abspath(triton.knobs.cache.dir)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    homeless = triton.knobs.cache.dir.startswith("~")  # or Triton makes a folder of this name in the current one
    if os.access(folder, os.W_OK | os.X_OK) and not homeless:
        return None
    with contextlib.suppress(OSError):
        made = tempfile.TemporaryDirectory(prefix="hybrid-triton-", ignore_cleanup_errors=True)
        triton.knobs.cache.dir = made.name
        return made
    return None


_CACHE = own_cache()


@triton.jit
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel's programs start, and wait until the kernel before is complete. More calls do nothing."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def is_native() -> bool:
    """Whether kernels run on a GPU, rather than in Triton's interpreter, which has no assembly."""
    return not isinstance(begin, InterpretedFunction)


def options(num_warps: int = 4) -> dict[str, Any]:
    """Arguments of a launch: `num_warps`, the kernel's constant `PDL`, and the option that goes with it."""
    if PDL and is_native() and _has_dependent_launch():
        return {"num_warps": num_warps, "PDL": True, "launch_pdl": True}
    return {"num_warps": num_warps, "PDL": False}


@cache
def _has_dependent_launch() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
