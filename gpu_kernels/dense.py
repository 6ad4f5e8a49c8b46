"""What a dense pass over many tokens does between its GEMMs, in place or into given buffers: nothing is allocated.

    split     terms[0] = bf16(x), terms[1] = bf16(x - terms[0]), terms[2] = bf16(x - terms[0] - terms[1])
    widen     out[i, j] = weight[i, j] as f32
    softmax   scores[h, r] = softmax over the keys that row r may see, 0 elsewhere
    activate  first = act(first) * second, or act(first); of dReLU relu(first) * relu(second)
    gather    out[:, h, i] = the keys and values of position i, wherever its block lies

The three terms of `split` add up to x, and the product of two bf16 values is exact in f32: so a GEMM of the terms with
bf16 weights on tensor cores, whose three results are added, is one of f32 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import SCALE_BYTES, activation_word
from gpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from gpu_kernels.constants import BLOCK_WEIGHTS, GROUP_WEIGHTS, INT4_OFFSET
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.rope import check_scales

TERMS = 3
_BLOCK = 1024
_WORDS = {"int8": torch.int8, "int4": torch.int16}  # what codes are loaded as
_UNBOUNDED = 2**30  # a window that sees every key


@triton.jit
def _split_kernel(x, terms, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    rest = tl.load(x + at, mask=mask, other=0.0)
    for i in tl.static_range(3):
        term = rest.to(tl.bfloat16)
        tl.store(terms + i * size + at, term, mask=mask)
        rest -= term.to(tl.float32)


def split(x: torch.Tensor, terms: torch.Tensor) -> None:
    """Write the three bf16 terms of x f32 [n, k] to `terms` [3, n, k]. Raises `ValueError` for a misfit."""
    fits = terms.shape == (TERMS, *x.shape) and x.dtype == torch.float32 and terms.dtype == torch.bfloat16
    if not fits or not x.is_contiguous() or not terms.is_contiguous():
        raise ValueError(
            f"split wants contiguous f32 [n, k] and bf16 [3, n, k], got {x.dtype} {tuple(x.shape)}, "
            f"{terms.dtype} {tuple(terms.shape)}"
        )
    _split_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, terms, x.numel(), BLOCK=_BLOCK)


def split_ref(x: torch.Tensor, terms: torch.Tensor) -> None:
    """`split` in torch."""
    rest = x.clone()
    for term in terms:
        term.copy_(rest)
        rest -= term.float()


@triton.jit
def _widen_kernel(rows, scales, out, columns, width, split_at, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """rows: codes in int8 or int16 words, `width` to a row; scales: f16, those of a row start at `split_at`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < columns
    if KIND == "int4":
        at = rows + row * width + c // GROUP_WEIGHTS * BLOCK_WEIGHTS + c % BLOCK_WEIGHTS
        words = tl.load(at, mask=mask, other=0).to(tl.int32)
        codes = ((words >> (c % GROUP_WEIGHTS // BLOCK_WEIGHTS * 4)) & 15) - INT4_OFFSET
        scale_width = width
    else:
        tl.static_assert(KIND == "int8", "unknown kind of rows in blocks")
        codes = tl.load(rows + row * width + c, mask=mask, other=0).to(tl.int32)
        scale_width = width // 2
    scale = tl.load(scales + row * scale_width + split_at + c // BLOCK_WEIGHTS, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * columns + c, codes.to(tl.float32) * scale, mask=mask)


def widen(matrix: DeviceMatrix, out: torch.Tensor) -> None:
    """Write all weights as f32 to `out`, contiguous [n, columns]. Raises `ValueError` for a misfit."""
    if out.shape != matrix.shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"widen wants contiguous f32 {matrix.shape}, got {out.dtype} {tuple(out.shape)}")
    if not matrix.layout.in_blocks:
        out.copy_(matrix.rows)
        return
    rows, scales = matrix.rows.view(_WORDS[matrix.kind]), matrix.rows.view(torch.float16)
    split_at = matrix.layout.codes_bytes(matrix.columns) // SCALE_BYTES
    grid = (matrix.shape[0], triton.cdiv(matrix.columns, _BLOCK))
    _widen_kernel[grid](
        rows, scales, out, matrix.columns, rows.shape[1], split_at, KIND=matrix.kind, BLOCK=_BLOCK
    )  # fmt: skip


def widen_ref(matrix: DeviceMatrix, out: torch.Tensor) -> None:
    """`widen` in torch."""
    out.copy_(matrix.widen())


@triton.jit
def _softmax_kernel(scores, rows, group, first_query, first_key, keys, window, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    query = first_query + row % rows // group
    end = tl.minimum(query + 1 - first_key, keys)
    begin = tl.maximum(query + 1 - window - first_key, 0)
    base = scores + row.to(tl.int64) * keys
    columns = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        c = start + columns
        highest = tl.maximum(highest, tl.load(base + c, mask=(c >= begin) & (c < end), other=float("-inf")))
    top = tl.max(highest, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        c = start + columns
        total += tl.exp(tl.load(base + c, mask=(c >= begin) & (c < end), other=float("-inf")) - top)
    scale = 1.0 / tl.sum(total, axis=0)
    for start in range(0, keys, BLOCK):
        c = start + columns
        share = tl.exp(tl.load(base + c, mask=(c >= begin) & (c < end), other=float("-inf")) - top) * scale
        tl.store(base + c, share, mask=c < keys)


def causal_softmax(
    scores: torch.Tensor, group: int, first_query: int, first_key: int = 0, window: int | None = None
) -> None:
    """Softmax of each row over the keys it may see, in place; 0 for the others.

    scores: contiguous f32 [heads, queries * group, keys]: `group` rows for each query, from position `first_query` on,
    over keys from position `first_key` on. A query sees itself and keys before it, of which `window` in all; every
    query must see one of these keys. Raises `ValueError` for a misfit.
    """
    if scores.ndim != 3 or scores.dtype != torch.float32 or not scores.is_contiguous() or scores.shape[1] % group:
        raise ValueError(f"causal_softmax wants contiguous f32 [heads, queries * {group}, keys], got {scores.dtype}")
    heads, rows, keys = scores.shape
    block = min(_BLOCK, triton.next_power_of_2(keys))
    _softmax_kernel[(heads * rows,)](
        scores, rows, group, first_query, first_key, keys, _UNBOUNDED if window is None else window, BLOCK=block
    )  # fmt: skip


def causal_softmax_ref(
    scores: torch.Tensor, group: int, first_query: int, first_key: int = 0, window: int | None = None
) -> None:
    """`causal_softmax` in torch, in f64."""
    rows, keys = scores.shape[1:]
    queries = first_query + torch.arange(rows, device=scores.device) // group
    ahead = queries[:, None] - first_key - torch.arange(keys, device=scores.device)
    seen = (ahead >= 0) & (ahead < (_UNBOUNDED if window is None else window))
    scores.copy_(scores.double().masked_fill(~seen, -torch.inf).softmax(-1))


@triton.jit
def _activate_kernel(first, second, size, WORD: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = activate(WORD, tl.load(first + at, mask=mask, other=0.0))
    if GATED:
        value *= activate_up(WORD, tl.load(second + at, mask=mask, other=0.0))
    tl.store(first + at, value, mask=mask)


def activate_product(first: torch.Tensor, second: torch.Tensor | None, activation: str) -> None:
    """first = act(first) * second in place, or act(first) without a second; contiguous f32 of one shape.

    Raises `ValueError` for a misfit.
    """
    for tensor in (first,) if second is None else (first, second):
        if tensor.shape != first.shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"activate_product wants contiguous f32 of one shape, got {tuple(tensor.shape)}")
    _activate_kernel[(triton.cdiv(first.numel(), _BLOCK),)](
        first, second, first.numel(), WORD=activation_word(activation), GATED=second is not None, BLOCK=_BLOCK
    )


def activate_product_ref(first: torch.Tensor, second: torch.Tensor | None, activation: str) -> None:
    """`activate_product` in torch."""
    value = activate_ref(activation, first.double())
    first.copy_(value if second is None else value * activate_up_ref(activation, second))


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    cache,
    scales,
    table,
    out,
    stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SIZE values of one block, of the keys or the values of one head."""
    number, row = tl.program_id(0), tl.program_id(1)
    block = tl.load(table + number).to(tl.int64)
    source = cache + (block * (2 * HEADS) + row) * SIZE
    target = out + row.to(tl.int64) * stride + number.to(tl.int64) * SIZE
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < SIZE, other=0).to(tl.float32)
        if SCALED:
            of = scales + (block * (2 * HEADS) + row) * (SIZE // HEAD_DIM)
            value *= tl.load(of + at // HEAD_DIM, mask=at < SIZE, other=0.0)
        tl.store(target + at, value, mask=at < SIZE)


def gather(cache: torch.Tensor, table: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None = None) -> None:
    """Copy the keys and values of a sequence's blocks to `out` in order.

    cache: [blocks, 2, n_kv_heads, block_size, head_dim] f32 or f16, or int8 with `scales` f32 [blocks, 2, n_kv_heads,
    block_size]; table: int32 [n] ids of the blocks; out: f32 [2, n_kv_heads, n * block_size, head_dim], which may be
    the first positions of a longer one. Raises `ValueError` for a misfit.
    """
    check_scales("gather", cache, scales)
    _, _, heads, size, head_dim = cache.shape
    fits = table.ndim == 1 and table.dtype == torch.int32 and out.shape == (2, heads, len(table) * size, head_dim)
    dense = out.stride() == (heads * out.stride(1), out.stride(1), head_dim, 1) and cache.is_contiguous()
    if not fits or out.dtype != torch.float32 or not dense:
        raise ValueError(
            f"gather wants a contiguous cache, int32 [n] and f32 [2, {heads}, n * {size}, {head_dim}], got "
            f"{table.dtype} {tuple(table.shape)} and {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )
    values = size * head_dim
    block = min(4 * _BLOCK, triton.next_power_of_2(values))
    _gather_kernel[(len(table), 2 * heads)](
        cache, scales, table, out, out.stride(1),
        HEADS=heads, SIZE=values, HEAD_DIM=head_dim, SCALED=scales is not None, BLOCK=block,
    )  # fmt: skip


def gather_ref(cache: torch.Tensor, table: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None = None) -> None:
    """`gather` in torch."""
    blocks = cache[table.long()].float()
    blocks = blocks if scales is None else blocks * scales[table.long()][..., None]
    out.copy_(blocks.permute(1, 2, 0, 3, 4).flatten(2, 3))
