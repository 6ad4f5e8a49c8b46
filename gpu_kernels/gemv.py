"""GEMV and small-batch GEMM: out[t] = act(W x[t] + b), for a few tokens, with f32 sums in a fixed order.

    out[t, n] (= or +=) act(sum over k of  weight[n, k] * x[t, k]  + bias[n])

A program computes `ROWS` rows whole, and reads their weights once for a group of up to 4 tokens. A token's sums are the
same bit for bit however many tokens there are. With scratch, 8 tokens and more go through tensor cores where there is
a way for the kind (`gpu_kernels/row_gemm.py`): their sums then are in another order, the same for 8, 16 and 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import GROUP, activation_word
from gpu_kernels.activations import NO_ACTIVATION, activate, activate_ref
from gpu_kernels.launch import begin, options
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.row_gemm import row_gemm, takes_rows
from gpu_kernels.tiles import VECTOR, load_step, program_in_group, row_dots, token_groups


@dataclass(frozen=True)
class Tiling:
    """rows: of a program; groups: that a thread loads of a row in a step (see `tiles.py`); warps: of a program."""

    rows: int
    groups: int
    warps: int

    def columns(self, kind: str, columns: int) -> int:
        """Columns of a step: the threads' groups, no more than the row has, a power of two."""
        wanted = self.groups * 32 * self.warps * VECTOR[kind]
        return max(GROUP, min(wanted, triton.next_power_of_2(columns)))


# bf16 measured within the decode step of a 7B shape on an H200, the others chosen for what compiles without spills.
TILINGS = {
    "bf16": Tiling(4, 1, 8),
    "f16": Tiling(4, 1, 8),
    "f32": Tiling(4, 2, 4),
    "int8": Tiling(4, 1, 4),
    "int4": Tiling(4, 1, 4),
}


@triton.jit
def _gemv(  # type: ignore[no-untyped-def]
    w, x, bias, out, n, x_stride, groups,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ADD: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    program, token = program_in_group(T, groups)
    row = program * R + tl.arange(0, R)
    inside = row < n
    step = load_step(w, row.to(tl.int64), inside, 0, KIND, K, R, C)
    begin(PDL)
    dots = row_dots(w, row.to(tl.int64), inside, x + token * x_stride, x_stride, KIND, K, T, R, C, step)
    for t in tl.static_range(T):
        value = dots[t]
        if bias is not None:
            value += tl.load(bias + row, mask=inside, other=0.0)
        value = activate(ACTIVATION, value)
        if ADD:
            value += tl.load(out + (token + t) * n + row, mask=inside, other=0.0)
        tl.store(out + (token + t) * n + row, value, mask=inside)


def gemv(
    matrix: DeviceMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    add: bool = False,
    activation: str | None = None,
    tiling: Tiling | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Write act(weight[n] . x[t] + bias[n]) to out[t, n], or with `add` add it there, for 1 to 4 tokens, or a multiple
    of 4 up to 32.

    matrix: [n, d]; x: [t, d] f32, its rows contiguous; bias: [n] f32 or None; out: [t, n] f32, contiguous;
    activation: a name that `contract.py` knows, None for none; tiling: for trials, None for the one measured best.
    scratch: f32 of `row_gemm.gemm_floats` elements, destroyed, or None for no tensor cores.
    Raises `ValueError` when shapes, strides or types do not fit.
    """
    together, groups = token_groups("gemv", x.shape[0])
    _check(matrix, x, bias, out, activation)
    n, d = matrix.shape
    code = NO_ACTIVATION if activation is None else activation_word(activation)
    if scratch is not None and takes_rows(matrix.kind, x.shape[0]):
        row_gemm(matrix, x, bias, out, add, code, scratch)
        return
    chosen = tiling or TILINGS[matrix.kind]
    _gemv[(triton.cdiv(n, chosen.rows) * groups,)](
        matrix.rows, x, bias, out, n, x.stride(0), groups,
        KIND=matrix.kind, K=d, T=together, R=chosen.rows, C=chosen.columns(matrix.kind, d),
        ADD=add, ACTIVATION=code, **options(chosen.warps),
    )  # fmt: skip


def _check(
    matrix: DeviceMatrix, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, activation: str | None
) -> None:
    n, d = matrix.shape
    tokens = x.shape[0]
    if x.shape != (tokens, d) or out.shape != (tokens, n) or (bias is not None and bias.shape != (n,)):
        given = "none" if bias is None else tuple(bias.shape)
        shapes = f"x {tuple(x.shape)}, bias {given}, out {tuple(out.shape)}"
        raise ValueError(f"gemv shapes do not fit: weight {matrix.shape}, {shapes}")
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (x, bias, out)):
        raise ValueError(f"gemv wants f32 x, bias and out, got {x.dtype} and {out.dtype}")
    if x.stride(1) != 1 or not out.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError(f"gemv wants contiguous rows of x, bias and out, got strides {x.stride()}, {out.stride()}")
    if activation is not None:
        activation_word(activation)


def gemv_ref(
    matrix: DeviceMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    add: bool = False,
    activation: str | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """`gemv` in torch, accumulated in f64."""
    value = x.double() @ matrix.widen().double().T
    if bias is not None:
        value += bias
    if activation is not None:
        value = activate_ref(activation, value)
    out.copy_(out + value if add else value)
