"""Sparse FFN: gate, activation and up fused over the active rows, then parts of the sum over their rows of down.

    hidden[t, k] = act(gate[i] . x[t] + gb[i]) * (up[i] . x[t] + ub[i])     gated, i = ids[k], k < count
    hidden[t, k] = act(up[i] . x[t] + ub[i])                                not gated
    parts[s, t]  = sum over the k of part s of  hidden[t, k] * down[ids[k]]

hidden[t, k] is 0 where row k is not token t's. The sum over s of parts, in order, is the answer; who adds it to the
residual adds the parts. Weights are neuron-major: row i of gate, up and (transposed) down belong to neuron i. With
`skip`, a neuron whose activation is 0 for every token ends there: its row of up is not read. Rows of down are read
where hidden is not 0 for some token.

Every sum has a fixed order. That of a token's hidden values is its own; that of its parts depends on the rows that all
tokens of the batch list, and on how many tokens there are: the one place of a step where a token's rounding may differ
with those beside it. From 8 tokens on there is another way, through tensor cores (`gpu_kernels/row_ffn.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import GROUP, activation_word
from gpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from gpu_kernels.gemv import Tiling
from gpu_kernels.launch import begin, options
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.row_ffn import row_ffn, takes_ffn
from gpu_kernels.tiles import (
    VECTOR,
    add_rows,
    append,
    load_step,
    program_in_group,
    row_dots,
    store_rows,
    token_groups,
    zero_tiles,
)

# Programs over the rows of gate and up: each takes blocks of rows until the list ends. Those without rows end at once.
PROGRAMS = 1056
DOWN_PROGRAMS = 264  # two for each processor of an H100
DOWN_COLUMNS = 64  # of a program of down: few, as then there are few parts, which one program adds up later
MAX_PARTS = 64


@dataclass(frozen=True)
class FFNTiling:
    """first: how gate and up are read; depth: rows of down that a thread has under way, for one token; columns (of
    int8 and int4 at least a group) and warps: of a program of down."""

    first: Tiling
    depth: int
    warps: int
    columns: int = GROUP


# bf16 measured within the decode step of a 7B shape on an H200, the others chosen for what compiles without spills.
TILINGS = {
    "bf16": FFNTiling(Tiling(2, 1, 8), 32, 4, DOWN_COLUMNS),
    "f16": FFNTiling(Tiling(2, 1, 8), 32, 4, DOWN_COLUMNS),
    "f32": FFNTiling(Tiling(2, 4, 4), 16, 4, DOWN_COLUMNS),
    "int8": FFNTiling(Tiling(2, 2, 4), 8, 4),
    "int4": FFNTiling(Tiling(2, 1, 4), 4, 4),
}


@dataclass(frozen=True, eq=False)
class DeviceFFNView:
    """The hot neurons of one layer: rows [hot, d] of one kind, f32 [hot] biases or None. Raises `ValueError`."""

    gate: DeviceMatrix | None
    up: DeviceMatrix
    down: DeviceMatrix
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    activation: str

    def __post_init__(self) -> None:
        activation_word(self.activation)
        for name, part in (("gate", self.gate), ("down", self.down)):
            if part is not None and (part.shape != self.up.shape or part.kind != self.up.kind):
                raise ValueError(f"{name} is {part.shape} of {part.kind}, up {self.up.shape} of {self.up.kind}")
        for name, bias in (("gate_bias", self.gate_bias), ("up_bias", self.up_bias)):
            if bias is not None and (tuple(bias.shape) != self.up.shape[:1] or bias.dtype != torch.float32):
                raise ValueError(f"{name} is {bias.dtype} {tuple(bias.shape)}, expected f32 {self.up.shape[:1]}")


def down_parts(d: int, columns: int = DOWN_COLUMNS) -> int:
    """Parts in which to sum rows of down of width `d`, so that there are about `DOWN_PROGRAMS` programs in all."""
    return max(1, min(MAX_PARTS, DOWN_PROGRAMS // triton.cdiv(d, columns)))


@triton.jit
def _any_nonzero(values, T: tl.constexpr):  # type: ignore[no-untyped-def]
    found = values[0] != 0.0
    for t in tl.static_range(1, T):
        found = found | (values[t] != 0.0)
    return found


@triton.jit
def _first_rows(  # type: ignore[no-untyped-def]
    w, bias, ids, live, bits, x, x_stride,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ACTIVATION: tl.constexpr
):  # fmt: skip
    """The activations of rows `ids` for T tokens, 0 where a row's bit, if there are `bits`, says that it is not t's."""
    dots = row_dots(w, ids, live, x, x_stride, KIND, K, T, R, C)
    values = ()
    for t in tl.static_range(T):
        value = dots[t]
        if bias is not None:
            value += tl.load(bias + ids, mask=live, other=0.0)
        wanted = live
        if bits is not None:
            wanted = live & (((bits >> t) & 1) != 0)
        values = append(values, tl.where(wanted, activate(ACTIVATION, value), 0.0))
    return values


@triton.jit
def _gate_and_up(  # type: ignore[no-untyped-def]
    gate, up, gate_bias, up_bias, x, x_stride, ids, count, masks, hidden, capacity, groups,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ACTIVATION: tl.constexpr, SKIP: tl.constexpr, EAGER: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    program, token = program_in_group(T, groups)
    x += token * x_stride
    hidden += token * capacity
    total = tl.minimum(tl.load(count), capacity)
    for start in range(program * R, total, tl.num_programs(0) // groups * R):
        at = start + tl.arange(0, R)
        live, bits = at < total, None
        rows = tl.load(ids + at, mask=live, other=0).to(tl.int64)
        mine = live
        if masks is not None:
            bits = tl.load(masks + at, mask=live, other=0) >> token
            mine = live & ((bits & ((1 << T) - 1)) != 0)
        if gate is None:
            first = _first_rows(up, up_bias, rows, mine, bits, x, x_stride, KIND, K, T, R, C, ACTIVATION)
            for t in tl.static_range(T):
                tl.store(hidden + t * capacity + at, first[t], mask=live)
        else:
            step = None
            if EAGER:
                step = load_step(up, rows, mine, 0, KIND, K, R, C)
            first = _first_rows(gate, gate_bias, rows, mine, bits, x, x_stride, KIND, K, T, R, C, ACTIVATION)
            needed = mine
            if SKIP:
                needed = mine & _any_nonzero(first, T)
            if tl.max(needed.to(tl.int32), 0) > 0:
                second = row_dots(up, rows, needed, x, x_stride, KIND, K, T, R, C, step)
                for t in tl.static_range(T):
                    value = second[t]
                    if up_bias is not None:
                        value += tl.load(up_bias + rows, mask=live, other=0.0)
                    tl.store(hidden + t * capacity + at, first[t] * activate_up(ACTIVATION, value), mask=live)
            else:
                for t in tl.static_range(T):
                    tl.store(hidden + t * capacity + at, first[t], mask=live)


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    w, ids, count, hidden, capacity, parts, groups, pieces, tokens,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, A: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """A block of columns of one part, for T of the tokens."""
    begin(PDL)
    c = tl.program_id(0) * C
    part = tl.program_id(1) // groups
    token = tl.program_id(1) % groups * T
    total = tl.minimum(tl.load(count), capacity)
    share = (total + pieces - 1) // pieces
    stop = tl.minimum((part + 1) * share, total)
    sums = zero_tiles(T * (4 if KIND == "int4" else 1), W, C // (4 if KIND == "int4" else 1))
    for start in range(part * share, stop, A * W):
        at = start + tl.arange(0, A * W)
        factors = ()
        for t in tl.static_range(T):
            end = tl.where(token + t < tokens, stop, 0)
            value = tl.load(hidden + (token + t) * capacity + at, mask=at < end, other=0.0)
            factors = append(factors, value)
        wanted = _any_nonzero(factors, T)
        rows = tl.load(ids + at, mask=at < stop, other=0).to(tl.int64)
        sums = add_rows(sums, w, rows, wanted, factors, c, KIND, K, T, A, W, C)
    out = parts + (part * tokens + token).to(tl.int64) * K
    store_rows(out, sums, c, KIND, K, T, C, K, tokens - token)


def sparse_ffn(
    ffn: DeviceFFNView,
    x: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    masks: torch.Tensor | None,
    hidden: torch.Tensor,
    parts: torch.Tensor,
    skip: bool = True,
    eager: bool = False,
    tiling: FFNTiling | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Write the sums of the active rows of down, each times its hidden value, in parts; see the module's formula.

    x: [t, d] f32, t of 1 to 4, or a multiple of 4 up to 32, its rows contiguous; ids: int32 [capacity], of which the
    first count[0] are row numbers below hot (not checked); count: int32 [1]; masks: int32 [capacity], bit t of masks[k]
    where row ids[k] is token t's, or None where all rows are everyone's; hidden: f32 [t, capacity], written; parts: f32
    [s, t, d], written whole. eager: rows of up are on their way before it is known which are needed, for where nearly
    all are. tiling: for trials, None for the one measured best.
    scratch: f32 of `row_ffn.ffn_floats` elements, destroyed: then 8 tokens and more with bf16 weights go through tensor
    cores, without skipping (`gpu_kernels/row_ffn.py`); None for no such way.
    Raises `ValueError` when shapes, strides or types do not fit.
    """
    together, groups = token_groups("sparse_ffn", x.shape[0])
    _check(ffn, x, ids, count, masks, hidden, parts)
    tokens, d = x.shape
    kind, capacity, pieces = ffn.up.kind, ids.shape[0], parts.shape[0]
    if scratch is not None and takes_ffn(kind, tokens):
        biases, word = (ffn.gate_bias, ffn.up_bias), activation_word(ffn.activation)
        row_ffn(ffn.gate, ffn.up, ffn.down, biases, word, x, (ids, count, masks), hidden, parts, scratch)
        return
    chosen = tiling or TILINGS[kind]
    first = chosen.first
    gate = None if ffn.gate is None else ffn.gate.rows
    _gate_and_up[(min(triton.cdiv(capacity, first.rows), PROGRAMS) * groups,)](
        gate, ffn.up.rows, ffn.gate_bias, ffn.up_bias, x, x.stride(0), ids, count, masks, hidden, capacity, groups,
        KIND=kind, K=d, T=together, R=first.rows, C=first.columns(kind, d),
        ACTIVATION=activation_word(ffn.activation), SKIP=skip, EAGER=eager, **options(first.warps),
    )  # fmt: skip
    # Registers hold the sums of all tokens of a program.
    depth = max(2, chosen.depth // triton.next_power_of_2(together))
    columns = min(chosen.columns, max(GROUP, triton.next_power_of_2(d)))
    wide = max(1, 32 * chosen.warps * VECTOR[kind] // columns)  # rows that all threads load at once
    _down[(triton.cdiv(d, columns), pieces * groups)](
        ffn.down.rows, ids, count, hidden, capacity, parts, groups, pieces, tokens,
        KIND=kind, K=d, T=together, A=depth, W=wide, C=columns, **options(chosen.warps),
    )  # fmt: skip


def _check(
    ffn: DeviceFFNView,
    x: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    masks: torch.Tensor | None,
    hidden: torch.Tensor,
    parts: torch.Tensor,
) -> None:
    tokens, d, capacity = x.shape[0], ffn.up.columns, ids.shape[0]
    expected = {
        "x": (x, (tokens, d), torch.float32),
        "ids": (ids, (capacity,), torch.int32),
        "count": (count, (1,), torch.int32),
        "masks": (masks, (capacity,), torch.int32),
        "hidden": (hidden, (tokens, capacity), torch.float32),
        "parts": (parts, (parts.shape[0], tokens, d), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            raise ValueError(f"sparse_ffn wants {name} {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor is not None and (tensor.stride(-1) != 1 or (name != "x" and not tensor.is_contiguous())):
            raise ValueError(f"sparse_ffn wants {name} contiguous, got strides {tensor.stride()}")


def sparse_ffn_ref(
    ffn: DeviceFFNView,
    x: torch.Tensor,
    ids: torch.Tensor,
    count: torch.Tensor,
    masks: torch.Tensor | None,
    hidden: torch.Tensor,
    parts: torch.Tensor,
    skip: bool = True,
    eager: bool = False,
    scratch: torch.Tensor | None = None,
) -> None:
    """`sparse_ffn` in torch, in f64; part 0 gets the whole sum, the others 0."""
    rows = ids[: int(count)].long()

    def project(weight: DeviceMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        z = x.double() @ weight.widen()[rows].double().T
        return z if bias is None else z + bias[rows]

    if ffn.gate is None:
        found = activate_ref(ffn.activation, project(ffn.up, ffn.up_bias))
    else:
        found = activate_ref(ffn.activation, project(ffn.gate, ffn.gate_bias))
        found = found * activate_up_ref(ffn.activation, project(ffn.up, ffn.up_bias))
    if masks is not None:
        tokens = torch.arange(x.shape[0], device=x.device)[:, None]
        found = found * ((masks[: len(rows)] >> tokens) & 1)
    hidden[:, : len(rows)] = found
    parts.zero_()
    parts[0] = found @ ffn.down.widen()[rows].double()
