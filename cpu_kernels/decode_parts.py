"""Parts that the phases of the decode step share: norms, projections, time; see `decode_step.py`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.addresses import floats
from cpu_kernels.compiled import subroutine
from cpu_kernels.gemv import gemv_shared
from cpu_kernels.inputs import copy, one_input
from cpu_kernels.norm import layer_norm_row, rms_norm_row
from cpu_kernels.row_dot import prepare
from cpu_kernels.row_types import group_bytes, row_group


@intrinsic
def tick(typing_context: Any) -> Any:
    """The processor's running count of ticks."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@subroutine
def row_bytes(like, columns):  # type: ignore[no-untyped-def]
    """Bytes of a row."""
    group = row_group(like)
    return (columns + group - 1) // group * group_bytes(like)


@subroutine
def normed(like, weight, bias, x, shape, eps, inputs):  # type: ignore[no-untyped-def]
    """inputs = norm of each row of x, in the form that rows of weights like `like` are multiplied with; weight, bias:
    addresses of f32, weight 0 where x is taken as it is."""
    d = shape.d
    for t in range(x.shape[0]):
        v = one_input(inputs, t)
        if weight == 0:
            copy(x[t], d, v[0])
        elif shape.layer_norm:
            layer_norm_row(x[t], floats(weight, d), floats(bias, d), eps, v[0])
        else:
            rms_norm_row(x[t], floats(weight, d), eps, v[0])
        prepare(like, v, d)


@subroutine
def add_normed(norm, rows, shape, eps, shared):  # type: ignore[no-untyped-def]
    """x += RMSNorm of shared.projected, with weights at the address `norm`; by one worker."""
    for t in range(rows):
        x, projected = shared.x[t], shared.projected[t]
        rms_norm_row(projected, floats(norm, shape.d), eps, projected)
        for j in range(shape.d):
            x[j] += projected[j]


@subroutine
def project(state, workers, like, weight, bias, n, columns, inputs, out):  # type: ignore[no-untyped-def]
    """out = W . input, which is in form; workers take pieces of the rows."""
    gemv_shared(state, workers, like, weight, row_bytes(like, columns), n, inputs, columns, floats(bias, n), out)
