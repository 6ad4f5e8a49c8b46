"""GEMM of 8, 16 or 32 rows with 16-bit weights on tensor cores, as exact as f32: out[t] = act(W x[t] + b).

    terms[0..2, t]   = x[t] / scales[t], split in three values of the weights' type, whose sum is x
    sums[s, t, n]    = part s of  sum over k of  weight[n, k] * (terms[2] + terms[1] + terms[0])[t, k]
    out[t, n]        (= or +=) act(scales[t] * (sum over s of sums[s, t, n]) + bias[n])

Products of two bf16 or two f16 values are exact in f32, in which they are added. `scales[t]` is a power of two that
brings a row's largest value near 2^15: f16 would not hold what is much larger, or what is left of a small one. A
program reads its weights once for all rows. There are parts where whole rows would not fill the GPU; how many, and
with them a row's sums, depends on the matrix alone and not on how many rows of x there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_kernels.activations import activate
from gpu_kernels.launch import begin, is_native, options
from gpu_kernels.matrix import KINDS, DeviceMatrix

TERMS = 3
SIZES, GEMM_KINDS = (8, 16, 32), ("bf16", "f16")  # rows of x, and kinds of weights, that it takes
TILE, STEP, WARPS, STAGES = 64, 64, 4, 5  # rows and columns of weights of a step, steps under way
GEMM_PROGRAMS, MOST_GEMM_PARTS = 400, 4  # about so many at once are three for each processor of an H100


def gemm_parts(n: int) -> int:
    """Parts of the columns in which to sum `n` rows."""
    return max(1, min(MOST_GEMM_PARTS, GEMM_PROGRAMS // triton.cdiv(n, TILE)))


def takes_rows(kind: str, tokens: int) -> bool:
    """Whether there is a GEMM of so many rows with weights of this kind."""
    return kind in GEMM_KINDS and tokens in SIZES


def gemm_floats(tokens: int, n: int, d: int) -> int:
    """f32 elements of scratch for `tokens` rows, a multiple of 8, and a matrix [n, d]: scales, terms, sums of parts."""
    return tokens + TERMS * tokens * d // 2 + tokens * n * gemm_parts(n) * (gemm_parts(n) > 1)


@triton.jit
def powers(largest):  # type: ignore[no-untyped-def]
    """A power of two that brings `largest` between 2^14 and 2^15, and the one that takes that back."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)  # both are to be normal numbers
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_terms(rest, terms, step, scale, mask, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's scale, and its terms, `step` apart; `rest` is 0 where it has no column."""
    down, up = powers(tl.max(tl.abs(rest), 0))
    tl.store(scale, up)
    rest *= down
    for i in tl.static_range(TERMS):
        term = rest.to(terms.dtype.element_ty)
        tl.store(terms + i * step, term, mask=mask)
        rest -= term.to(tl.float32)


@triton.jit
def _terms_kernel(  # type: ignore[no-untyped-def]
    x, x_stride, terms, scales, K: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A row's terms and scale; axis 0 of the grid is the rows."""
    begin(PDL)
    t, tokens = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    rest = tl.load(x + t * x_stride + at, mask=at < K, other=0.0)
    store_terms(rest, terms + t * K + at, tokens * K, scales + t, at < K, TERMS)


@triton.jit
def term_dots(  # type: ignore[no-untyped-def]
    sums, wide, terms, step, stride, at, stop, T: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """sums [R, T] + wide [R, C] times columns `at`, below `stop` if there is one, of all terms, the smallest first.

    terms: `step` apart, their rows `stride`. Tensor cores cut off what they add up, some 1e-5 of a long sum, so the sum
    of a step begins at 0 there and is added in f32; the product with a 1 that the compiler cannot know keeps it from
    giving the whole sum to them. Triton's interpreter (not `NATIVE`) multiplies the bits of bf16: there all are
    widened first.
    """
    place = terms + tl.arange(0, T)[None, :] * stride + at[:, None]
    found = tl.zeros_like(sums)
    for i in tl.static_range(2, -1, -1):
        if stop is None:
            term = tl.load(place + i * step)
        else:
            term = tl.load(place + i * step, mask=at[:, None] < stop, other=0.0)
        found = tl.dot(wide, term, found) if NATIVE else tl.dot(wide.to(tl.float32), term.to(tl.float32), found)
    return sums + found * tl.num_programs(2).to(tl.float32)


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    value, out, bias, row, inside, mask, ADD: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    if bias is not None:
        value += tl.load(bias + row, mask=inside, other=0.0)
    value = activate(ACTIVATION, value)
    if ADD:
        value += tl.load(out, mask=mask, other=0.0)
    return value


@triton.jit
def _gemm_kernel(  # type: ignore[no-untyped-def]
    w, terms, scales, bias, out, sums, n,
    K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    ADD: tl.constexpr, ACTIVATION: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """R rows of one part of the columns, for all T rows of x; of the only part the answer."""
    row, part, token = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1), tl.arange(0, T)
    inside, rows = row < n, w + row.to(tl.int64) * K
    WIDTH: tl.constexpr = ((K + C - 1) // C + PARTS - 1) // PARTS * C
    begin(PDL)
    found = tl.zeros((R, T), tl.float32)
    for c in range(part * WIDTH, tl.minimum((part + 1) * WIDTH, K), C):
        at = c + tl.arange(0, C)
        wide = tl.load(rows[:, None] + at[None, :], mask=inside[:, None] & (at < K)[None, :], other=0.0)
        found = term_dots(found, wide, terms, T * K, K, at, K, T, NATIVE)
    place, mask = token[None, :] * n + row[:, None], inside[:, None]
    if PARTS > 1:
        tl.store(sums + part * T * n + place, found, mask=mask)
    else:
        value = found * tl.load(scales + token)[None, :]
        value = _finished(value, out + place, bias, row[:, None], mask, mask, ADD, ACTIVATION)
        tl.store(out + place, value, mask=mask)


@triton.jit
def _add_kernel(  # type: ignore[no-untyped-def]
    sums, scales, bias, out, n, T: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A block of one row of out, from all parts in order."""
    row, t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside, place = row < n, t * n + row
    begin(PDL)
    value = tl.load(sums + place, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(sums + part * T * n + place, mask=inside, other=0.0)
    value = _finished(value * tl.load(scales + t), out + place, bias, row, inside, inside, ADD, ACTIVATION)
    tl.store(out + place, value, mask=inside)


def split_rows(x: torch.Tensor, terms: torch.Tensor, scales: torch.Tensor) -> None:
    """Write the terms [p, t, d] and scales f32 [t] of x f32 [t, d], whose rows are contiguous."""
    tokens, d = x.shape
    block = triton.next_power_of_2(d)
    _terms_kernel[(tokens,)](x, x.stride(0), terms, scales, K=d, TERMS=len(terms), BLOCK=block, **options(8))


def split_rows_ref(x: torch.Tensor, terms: torch.Tensor, scales: torch.Tensor) -> None:
    """`split_rows` in torch."""
    exponents = torch.frexp(x.abs().amax(-1))[1].clamp(-111, 128)
    scales.copy_(torch.ldexp(torch.ones_like(scales), exponents - 15))
    rest = torch.ldexp(x, (15 - exponents)[:, None])
    for term in terms:
        term.copy_(rest)
        rest -= term.float()


def row_gemm(
    matrix: DeviceMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    add: bool,
    activation: int,
    scratch: torch.Tensor,
) -> None:
    """`gemv` of 8, 16 or 32 rows with bf16 or f16 weights; shapes are `gemv`'s to check, `activation` is its word.

    scratch: contiguous f32 of at least `gemm_floats`, whose content is destroyed. Raises `ValueError` for less.
    """
    tokens, (n, d), parts = x.shape[0], matrix.shape, gemm_parts(matrix.shape[0])
    if scratch.dtype != torch.float32 or not scratch.is_contiguous() or scratch.numel() < gemm_floats(tokens, n, d):
        raise ValueError(
            f"row_gemm wants {gemm_floats(tokens, n, d)} f32 of scratch, got {scratch.dtype} {tuple(scratch.shape)}"
        )
    scales, rest = scratch.view(-1)[:tokens], scratch.view(-1)[tokens:]
    size = TERMS * tokens * d // 2
    terms, sums = rest[:size].view(KINDS[matrix.kind]).view(TERMS, tokens, d), rest[size:]
    split_rows(x, terms, scales)
    last = {"PARTS": parts, "ADD": add, "ACTIVATION": activation}
    _gemm_kernel[(triton.cdiv(n, TILE), parts)](
        matrix.rows, terms, scales, bias, out, sums, n, K=d, T=tokens, R=TILE, C=STEP, **last,
        NATIVE=is_native(), num_stages=STAGES, **options(WARPS),
    )  # fmt: skip
    if parts > 1:
        _add_kernel[(triton.cdiv(n, 1024), tokens)](
            sums, scales, bias, out, n, T=tokens, BLOCK=1024, **last, **options(4)
        )  # fmt: skip
