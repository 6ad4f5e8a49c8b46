"""A barrier for threads that are inside one `nogil` kernel call: they wait for each other without leaving it.

Threads: any number of workers call `wait` on one state. A waiting thread polls with the processor's pause instruction,
for longer than workers of one kernel differ, then naps between polls: a worker whose core others want as well is soon
scheduled again if it has slept, and late if it has polled. `abort`, from any thread, sends all home: their `wait`
returns False and their kernel must return.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.compiled import kernel, subroutine

# Each counter has two cache lines to itself: processors fetch lines in pairs, and sharing one costs a miss a poll.
_STRIDE = 16
_ARRIVED, _GENERATION, _ABORTED, _TAKEN = 0, _STRIDE, 2 * _STRIDE, 3 * _STRIDE
_LINE_BYTES = 128
# Polls before the first nap: 100 to 300 us, longer than workers of one kernel differ, far below a time slice.
_SPINS = 5000
NAP_MICROSECONDS = 20

_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def _element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@intrinsic
def load_acquire(typing_context: Any, array: Any, index: Any) -> Any:
    """array[index] of an int64 array; later reads see what was written before the matching `store_release`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_element(context, builder, signature.args[0], args[0], args[1]), "acquire", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def store_release(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, after everything that this thread wrote before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _element(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], at, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def fetch_add(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to array[index] in one step; returns the value before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _element(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", at, args[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell an x86 processor that this is a polling loop; nothing on others."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if builder.module.triple.startswith(("x86", "i386", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


def new_barrier() -> np.ndarray:
    """The state of one barrier: int64, zeros, aligned so that no counter shares a cache line."""
    raw = np.zeros(5 * _STRIDE, np.int64)
    skipped = -raw.ctypes.data % _LINE_BYTES // raw.itemsize
    return raw[skipped : skipped + 4 * _STRIDE]


@subroutine
def nap(microseconds):  # type: ignore[no-untyped-def]
    """Sleep between two polls."""
    _usleep(microseconds)


@subroutine
def is_aborted(state):  # type: ignore[no-untyped-def]
    """Whether `abort` was called since the last `reset`."""
    return load_acquire(state, _ABORTED) != 0


@subroutine
def leave(state):  # type: ignore[no-untyped-def]
    """`abort` from inside a kernel: the calling worker will not come to the barrier again."""
    store_release(state, _ABORTED, 1)


@kernel
def wait(state, workers):  # type: ignore[no-untyped-def]
    """Wait until all `workers` have called this; what they wrote before is then seen by all. False once aborted."""
    if load_acquire(state, _ABORTED) != 0:
        return False
    generation = load_acquire(state, _GENERATION)
    if fetch_add(state, _ARRIVED, 1) == workers - 1:
        store_release(state, _ARRIVED, 0)
        store_release(state, _TAKEN, 0)
        store_release(state, _GENERATION, generation + 1)
        return True
    spins = 0
    while load_acquire(state, _GENERATION) == generation:
        if load_acquire(state, _ABORTED) != 0:
            return False
        if spins < _SPINS:
            spins += 1
            pause()
        else:
            nap(NAP_MICROSECONDS)
    return True


@subroutine
def take(state):  # type: ignore[no-untyped-def]
    """The next piece of work, 0 first; between two waits each number goes to one worker, whichever asks next.

    Who takes what differs from run to run, so a piece's result must not depend on it.
    """
    return fetch_add(state, _TAKEN, 1)


@subroutine
def restart(state):  # type: ignore[no-untyped-def]
    """Number the pieces of work from 0 again; for a state that only the calling worker uses."""
    store_release(state, _TAKEN, 0)


def abort(state: np.ndarray) -> None:
    """Make every present and later `wait` on `state` return False until `reset`."""
    state[_ABORTED] = 1


def reset(state: np.ndarray) -> None:
    """Make `state` ready for the next run; nobody may be waiting on it."""
    state[:] = 0
