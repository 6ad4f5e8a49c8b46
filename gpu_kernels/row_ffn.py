"""The sparse FFN of 8, 16 or 32 rows with bf16 weights on tensor cores: listed rows are read once for all rows of x.

    sums[s, 0, t, k]   = part s of up[ids[k]] . x[t], and sums[s, 1, t, k] of gate[ids[k]] . x[t]
    hidden[t, k]       = act(gate) * up of the sums over s; as three bf16 terms, too
    parts[s, t]        = sum over the k of part s of  hidden[t, k] * down[ids[k]]

What `sparse_ffn` says of hidden and parts is true here, but all listed rows of up and down are read: among so many
tokens there are few whose activation is 0 for each. The order of a token's sums does not depend on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gpu_kernels.activations import activate, activate_up
from gpu_kernels.launch import begin, is_native, options
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.row_gemm import SIZES, STEP, TERMS, TILE, WARPS, split_rows, term_dots

FFN_PARTS = 4  # in which columns of gate and up are summed: lists may be short
STAGES, DOWN_STAGES = 4, 8  # of down, half of them for the numbers of its rows
_BLOCK = 256  # rows whose hidden values a program computes


def takes_ffn(kind: str, tokens: int) -> bool:
    """Whether there is this way for so many rows of x with weights of this kind. f16 would need a scale for hidden."""
    return kind == "bf16" and tokens in SIZES


def _stride(capacity: int) -> int:
    """Between two rows of sums and of hidden's terms: whole tiles, which `down` reads without a mask."""
    return triton.cdiv(capacity, TILE) * TILE


def ffn_floats(tokens: int, capacity: int, d: int, gated: bool) -> int:
    """f32 elements of scratch for lists of up to `capacity` rows: scales, terms of x and hidden, and sums."""
    width = _stride(capacity)
    return tokens + TERMS * tokens * (d + width) // 2 + FFN_PARTS * (1 + gated) * tokens * width


@triton.jit
def _project_kernel(  # type: ignore[no-untyped-def]
    gate, up, terms, sums, ids, count, capacity, stride, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, PARTS: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """R listed rows of one part of the columns, of up and where there is one of gate."""
    begin(PDL)
    at, part, token = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1), tl.arange(0, T)
    total = tl.minimum(tl.load(count), capacity)
    live = at < total
    rows = tl.load(ids + at, mask=live, other=0).to(tl.int64) * K
    WIDTH: tl.constexpr = ((K + C - 1) // C + PARTS - 1) // PARTS * C
    stop = tl.where(tl.program_id(0) * R < total, tl.minimum((part + 1) * WIDTH, K), 0)
    first, second = tl.zeros((R, T), tl.float32), tl.zeros((R, T), tl.float32)
    for c in range(part * WIDTH, stop, C):
        column = c + tl.arange(0, C)
        mask = live[:, None] & (column < K)[None, :]
        wide = tl.load(up + rows[:, None] + column[None, :], mask=mask, other=0.0)
        first = term_dots(first, wide, terms, T * K, K, column, K, T, NATIVE)
        if gate is not None:
            wide = tl.load(gate + rows[:, None] + column[None, :], mask=mask, other=0.0)
            second = term_dots(second, wide, terms, T * K, K, column, K, T, NATIVE)
    KINDS: tl.constexpr = 1 if gate is None else 2
    place = sums + (part * KINDS * T + token)[None, :] * stride + at[:, None]
    tl.store(place, first, mask=live[:, None])
    if gate is not None:
        tl.store(place + T * stride, second, mask=live[:, None])


@triton.jit
def _added(sums, at, live, step, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum over all parts, which lie `step` apart, in order."""
    value = tl.load(sums + at, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(sums + part * step + at, mask=live, other=0.0)
    return value


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    sums, scales, gate_bias, up_bias, ids, count, masks, hidden, terms, capacity, stride, T: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """A block of one token's hidden values and their terms, which are 0 from the list's end on to that of R rows."""
    begin(PDL)
    at, t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    total = tl.minimum(tl.load(count), capacity)
    live = at < total
    row = tl.load(ids + at, mask=live, other=0)
    scale, step = tl.load(scales + t), (2 if GATED else 1) * T * stride
    value = _added(sums + t * stride, at, live, step, PARTS) * scale
    if up_bias is not None:
        value += tl.load(up_bias + row, mask=live, other=0.0)
    if GATED:
        first = _added(sums + (T + t) * stride, at, live, step, PARTS) * scale
        if gate_bias is not None:
            first += tl.load(gate_bias + row, mask=live, other=0.0)
        value = activate(ACTIVATION, first) * activate_up(ACTIVATION, value)
    else:
        value = activate(ACTIVATION, value)
    if masks is not None:
        value = tl.where(((tl.load(masks + at, mask=live, other=0) >> t) & 1) != 0, value, 0.0)
    value = tl.where(live, value, 0.0)
    tl.store(hidden + t * capacity + at, value, mask=live)
    for i in tl.static_range(3):
        term = value.to(tl.bfloat16)
        tl.store(terms + (i * T + t) * stride + at, term, mask=at < (total + R - 1) // R * R)
        value -= term.to(tl.float32)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    w, terms, ids, count, parts, capacity, stride, pieces, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """C columns of one part of the list, R rows at a time."""
    begin(PDL)
    column, part, token = tl.program_id(0) * C + tl.arange(0, C), tl.program_id(1), tl.arange(0, T)
    total = tl.minimum(tl.load(count), capacity)
    share = ((total + pieces - 1) // pieces + R - 1) // R * R
    stop = tl.minimum((part + 1) * share, total)
    found = tl.zeros((C, T), tl.float32)
    for start in range(part * share, stop, R):
        at = start + tl.arange(0, R)
        rows = tl.load(ids + at, mask=at < stop, other=0).to(tl.int64) * K
        mask = (at < stop)[:, None] & (column < K)[None, :]
        wide = tl.load(w + rows[:, None] + column[None, :], mask=mask, other=0.0)
        found = term_dots(found, tl.trans(wide), terms, T * stride, stride, at, None, T, NATIVE)
    place = parts + (part * T + token)[None, :] * K + column[:, None]
    tl.store(place, found, mask=(column < K)[:, None])


def row_ffn(
    gate: DeviceMatrix | None,
    up: DeviceMatrix,
    down: DeviceMatrix,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    activation: int,
    x: torch.Tensor,
    listed: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    hidden: torch.Tensor,
    parts: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """`sparse_ffn` of 8, 16 or 32 tokens with bf16 weights; shapes are its to check, `activation` is its word.

    biases: of gate and up; listed: ids, count and masks; scratch: contiguous f32 of at least `ffn_floats`, whose
    content is destroyed. Raises `ValueError` for less.
    """
    (tokens, d), (ids, count, masks), gated = x.shape, listed, gate is not None
    capacity, width = ids.shape[0], _stride(ids.shape[0])
    wanted = ffn_floats(tokens, capacity, d, gated)
    if scratch.dtype != torch.float32 or not scratch.is_contiguous() or scratch.numel() < wanted:
        raise ValueError(f"row_ffn wants {wanted} f32 of scratch, got {scratch.dtype} {tuple(scratch.shape)}")
    sizes = [tokens, TERMS * tokens * d // 2, TERMS * tokens * width // 2]
    scales, terms, of_hidden, sums = scratch.view(-1)[:wanted].split([*sizes, wanted - sum(sizes)])
    terms, of_hidden = terms.view(torch.bfloat16).view(TERMS, tokens, d), of_hidden.view(torch.bfloat16)
    tile: dict[str, Any] = {"K": d, "T": tokens, "R": TILE, "C": STEP, "NATIVE": is_native()}
    split_rows(x, terms, scales)
    _project_kernel[(triton.cdiv(capacity, TILE), FFN_PARTS)](
        None if gate is None else gate.rows, up.rows, terms, sums, ids, count, capacity, width, PARTS=FFN_PARTS,
        num_stages=STAGES, **tile, **options(WARPS),
    )  # fmt: skip
    _hidden_kernel[(triton.cdiv(capacity, _BLOCK), tokens)](
        sums, scales, *biases, ids, count, masks, hidden, of_hidden, capacity, width, T=tokens, R=TILE, PARTS=FFN_PARTS,
        GATED=gated, ACTIVATION=activation, BLOCK=_BLOCK, **options(4),
    )  # fmt: skip
    _down_kernel[(triton.cdiv(d, STEP), parts.shape[0])](
        down.rows, of_hidden, ids, count, parts, capacity, width, parts.shape[0], num_stages=DOWN_STAGES, **tile,
        **options(WARPS),
    )  # fmt: skip
