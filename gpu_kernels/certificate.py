"""Certificates on the GPU: which neurons may fire, by copies of their rows in 8 bits; the formula and its proof are in
`cpu_kernels/certificate.py` and `error_bound.py`.

    masks[i] = sum over t of 2^t  where not  q[i] . x[t] + b[i] + slope[i] * sum of s n + rest[i] |x[t]|  <=  threshold

Codes are multiplied in f32 by inputs in f32, which the CPU rounds to 16 bits: the bound holds for both, and who is in
doubt here and not there comes out 0 all the same. Norms are of halves of blocks, 16 columns, as a thread has them. A
program reads its rows once for up to 4 tokens, and for more finds them in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu_kernels.gemv import TILINGS, Tiling
from gpu_kernels.launch import begin, options
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.tiles import append, int8_codes, load_groups, load_step, token_groups, zero_tiles

_HALF = tl.constexpr(16)  # columns whose norms are taken together
_LEAST, _LEAST_NORM, _MOST = tl.constexpr(1e-30), tl.constexpr(1e-18), tl.constexpr(1e32)
_ADDED = tl.constexpr(2.0**-21)


@dataclass(frozen=True, eq=False)
class DeviceCertificateView:
    """One layer's certificate as the kernel sees it. rows: int8 [f, d]; slope, rest: f32 [f]; bias: f32 [f] of the rows
    that decide, or None; threshold: at and below which the activation is 0. Raises `ValueError` for others."""

    rows: DeviceMatrix
    slope: torch.Tensor
    rest: torch.Tensor
    bias: torch.Tensor | None
    threshold: float

    def __post_init__(self) -> None:
        if self.rows.kind != "int8":
            raise ValueError(f"a certificate's rows are int8, got {self.rows.kind}")
        for name in ("slope", "rest", "bias"):
            part = getattr(self, name)
            if part is not None and (part.shape != self.rows.shape[:1] or part.dtype != torch.float32):
                raise ValueError(f"a certificate's {name} is {part.dtype} {tuple(part.shape)}, rows {self.rows.shape}")


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    sums, scaled, squares, step, x, x_stride, c, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """What the columns of one `load_step` add: T tiles [R, G] of products, T of scales times norms, T squares [G]."""
    G: tl.constexpr = C // _HALF
    wide, scale = int8_codes(step[0], R, G), step[1]
    first = c + tl.arange(0, G) * _HALF
    more_sums, more_scaled, more_squares = (), (), ()
    for t in tl.static_range(T):
        values = load_groups(x + t * x_stride, first, K, _HALF)
        square = tl.sum(values * values, 1)
        more_sums = append(more_sums, sums[t] + scale * tl.sum(wide * values[None, :, :], 2))
        more_scaled = append(more_scaled, scaled[t] + scale * (tl.sqrt(square) + _LEAST_NORM)[None, :])
        more_squares = append(more_squares, squares[t] + square)
    return more_sums, more_scaled, more_squares


@triton.jit
def _certify_kernel(  # type: ignore[no-untyped-def]
    w, slope, rest, bias, threshold, x, x_stride, masks, f, groups,
    K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """masks[R rows of this program], of all groups of T tokens."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside, ids = row < f, row.to(tl.int64)
    step = load_step(w, ids, inside, 0, "int8", K, R, C)
    a, r = tl.load(slope + row, mask=inside, other=0.0), tl.load(rest + row, mask=inside, other=0.0)
    b = tl.zeros((R,), tl.float32)
    if bias is not None:
        b = tl.load(bias + row, mask=inside, other=0.0)
    begin(PDL)
    bits = tl.zeros((R,), tl.int32)
    for group in range(groups):
        at = x + group * T * x_stride
        sums, scaled, squares = zero_tiles(T, R, C // _HALF), zero_tiles(T, R, C // _HALF), ()
        for _t in tl.static_range(T):
            squares = append(squares, tl.zeros((C // _HALF,), tl.float32))
        sums, scaled, squares = _step(sums, scaled, squares, step, at, x_stride, 0, K, T, R, C)
        for c in range(C, K, C):
            following = load_step(w, ids, inside, c, "int8", K, R, C)
            sums, scaled, squares = _step(sums, scaled, squares, following, at, x_stride, c, K, T, R, C)
        for t in tl.static_range(T):
            z = tl.sum(sums[t], 1)
            length = tl.sqrt(tl.sum(squares[t], 0)) + 100 * _LEAST_NORM
            bound = a * tl.sum(scaled[t], 1) + r * length + _LEAST
            added = _ADDED * (tl.abs(z) + tl.abs(b) + tl.abs(threshold))
            silent = (z + b + bound + added <= threshold) & (bound < _MOST)
            bits |= tl.where(silent, 0, 1) << (group * T + t)
    tl.store(masks + row, bits, mask=inside)


def certify(
    view: DeviceCertificateView, x: torch.Tensor, masks: torch.Tensor, tiling: Tiling = TILINGS["int8"]
) -> None:
    """Write which neurons may fire: bit t of masks[i] is set unless it is proved that neuron i does not for token t.

    x: f32 [t, d] of 1 to 4 tokens, or a multiple of 4 up to 32, its rows contiguous, the FFN's input; masks: int32 [f].
    tiling: for trials. Raises `ValueError` when shapes or types do not fit.
    """
    f, d = view.rows.shape
    together, groups = token_groups("certify", len(x))
    if x.shape != (len(x), d) or x.dtype != torch.float32 or x.stride(1) != 1:
        raise ValueError(f"certify wants f32 x [t, {d}] in contiguous rows, got {x.dtype} {tuple(x.shape)}")
    if masks.shape != (f,) or masks.dtype != torch.int32 or not masks.is_contiguous():
        raise ValueError(f"certify wants contiguous int32 masks of {f}, got {masks.dtype} {tuple(masks.shape)}")
    rows = max(1, tiling.rows // together)
    _certify_kernel[(triton.cdiv(f, rows),)](
        view.rows.rows, view.slope, view.rest, view.bias, float(view.threshold), x, x.stride(0), masks, f, groups,
        K=d, T=together, R=rows, C=tiling.columns("int8", d), **options(tiling.warps),
    )  # fmt: skip


def certify_ref(view: DeviceCertificateView, x: torch.Tensor, masks: torch.Tensor) -> None:
    """`certify` in torch, in f64."""
    codes = view.rows.rows.shape[1] // 34 * 32
    scales = view.rows.rows[:, codes:].contiguous().view(torch.float16).double()
    wide = torch.nn.functional.pad(x.double(), (0, codes - x.shape[1]))
    norms = wide.view(len(x), -1, 2, 16).norm(dim=3).sum(2)
    bound = norms @ scales.T * view.slope + wide.norm(dim=1)[:, None] * view.rest
    z = x.double() @ view.rows.widen().double().T + (0 if view.bias is None else view.bias)
    named = (z + bound <= view.threshold).logical_not()
    masks.copy_((named.int() << torch.arange(len(x), device=x.device, dtype=torch.int32)[:, None]).sum(0))
