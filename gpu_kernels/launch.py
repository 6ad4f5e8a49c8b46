"""How kernels of a decode step are launched: each while the one before it still runs (programmatic dependent launch).

Launching a kernel after the last program of its predecessor has ended costs one to two microseconds, and a layer has
a dozen kernels. So every kernel here calls `begin` and is launched with `options`: the GPU then starts programs as soon
as all those of its predecessor have started, and they wait in `begin` until that one is complete and what it wrote is
visible.

Correctness rests on one rule: every kernel launched with `options` calls `begin` in every program, before it reads
anything that a kernel writes, and before it writes anything. A kernel is then complete only after its predecessor is,
and so after all before that, and nobody overwrites what an earlier kernel still reads. Only weights, which no kernel
writes, may be read before `begin`: `prefetch_rows` has them brought to the L2 cache meanwhile. What is launched without
the option, such as torch's own kernels and copies, waits for all before it, as always, and the next kernel waits for
it.

Triton's interpreter and GPUs before compute capability 9.0 have no such launches: there `begin` and `prefetch_rows` do
nothing.
"""

from __future__ import annotations

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
# False leaves `prefetch_rows` out, likewise; to be set before the first launch, which compiles it in.
PREFETCH = tl.constexpr(True)


@triton.jit
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel's programs start, and wait until the kernel before is complete. More calls do nothing."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_rows(w, first, n, R: tl.constexpr, ROW: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for rows first .. min(first + R, n) of ROW bytes each of the weights at `w`; one thread asks for all."""
    if PDL and PREFETCH:
        start = (w.to(tl.int64) + first.to(tl.int64) * ROW) & -16  # the instruction takes whole 16 bytes
        size = (tl.minimum(n - first, R) * ROW) & -16
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 p, thread, 0;
            setp.gt.and.s32 p, $2, 0, p;
            @p cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [start, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


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
