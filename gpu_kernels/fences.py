"""How a kernel and the host hand numbers to each other through pinned memory: release, acquire, and a clock to wait by.

On a GPU by PTX; in Triton's interpreter (not `NATIVE`), where all is in order, by plain loads and stores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def release(address, number, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write `number`, after all that this program wrote before."""
    tl.debug_barrier()
    if NATIVE:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.release.sys.b64 [$1], $2; mov.b32 $0, 0;",
            "=r,l,l",
            [address.to(tl.int64), number],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(address, number)


@triton.jit
def next_number(counter):  # type: ignore[no-untyped-def]
    """Count on; every thread reads the same number, so none may write before all have read."""
    number = tl.load(counter) + 1
    tl.debug_barrier()
    tl.store(counter, number)
    return number


@triton.jit
def acquire(address, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read a number that the host releases."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.b64 $0, [$1];", "=l,l", [address.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )
    return tl.load(address, volatile=True)


@triton.jit
def nanoseconds(start, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A clock; where there is none, one more than `start`."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l,l", [start], dtype=tl.int64, is_pure=False, pack=1
        )
    return start + 1
