"""Proxy on the GPU: which neurons are worth computing, by low-bit copies of gate and up; see `cpu_kernels/proxy.py`.

    score[t, i] = |act(gate~[i] . x[t] + gb[i]) * (up~[i] . x[t] + ub[i])| * length[i]     without gate: |act(up~ . x)|
    masks[i]    = sum over t of 2^t  where  score[t, i] >= threshold

Inputs are f32; the CPU rounds them to 16 bits, so a neuron right at the threshold may differ. A token's bits do not
depend on how many tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import activation_word
from gpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from gpu_kernels.gemv import Tiling
from gpu_kernels.launch import begin, options
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.tiles import load_step, row_dots, token_groups

# Chosen for what compiles without spills: four rows of gate beside those of up, which are loaded ahead, do not.
TILINGS = {"int4": Tiling(2, 1, 4), "int8": Tiling(2, 1, 4)}


@dataclass(frozen=True, eq=False)
class DeviceProxyView:
    """One layer's proxy: gate (or None) and up, rows in blocks of one kind, lengths and biases (or None) f32 [f]; all
    on one device. Raises `ValueError`."""

    gate: DeviceMatrix | None
    up: DeviceMatrix
    lengths: torch.Tensor
    threshold: float
    activation: str
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        activation_word(self.activation)
        if self.up.kind not in TILINGS:
            raise ValueError(f"a proxy's rows are of {' or '.join(TILINGS)}, got {self.up.kind}")
        if self.gate is not None and (self.gate.shape, self.gate.kind) != (self.up.shape, self.up.kind):
            raise ValueError(f"a proxy's gate is {self.gate.kind} {self.gate.shape}, up {self.up.kind} {self.up.shape}")
        wanted = self.up.shape[:1]
        for name, part in (("lengths", self.lengths), ("gate_bias", self.gate_bias), ("up_bias", self.up_bias)):
            if part is not None and (tuple(part.shape) != wanted or part.dtype != torch.float32):
                raise ValueError(f"a proxy's {name} is {part.dtype} {tuple(part.shape)}, expected f32 {wanted}")

    @property
    def nbytes(self) -> int:
        """Bytes on the device that naming one token's neurons reads."""
        return self.up.nbytes + (0 if self.gate is None else self.gate.nbytes) + self.lengths.nbytes


@triton.jit
def _passing_kernel(  # type: ignore[no-untyped-def]
    gate, up, gate_bias, up_bias, lengths, threshold, x, x_stride, masks, f, groups,
    KIND: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """masks[R rows of this program], of all groups of T tokens."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < f
    rows = row.to(tl.int64)
    step = load_step(up, rows, inside, 0, KIND, K, R, C)
    length = tl.load(lengths + row, mask=inside, other=0.0)
    begin(PDL)
    bits = tl.zeros((R,), tl.int32)
    for group in range(groups):
        given = x + group * T * x_stride
        ups = row_dots(up, rows, inside, given, x_stride, KIND, K, T, R, C, step)
        gates = ups
        if gate is not None:
            gates = row_dots(gate, rows, inside, given, x_stride, KIND, K, T, R, C)
        for t in tl.static_range(T):
            value = ups[t]
            if up_bias is not None:
                value += tl.load(up_bias + row, mask=inside, other=0.0)
            if gate is None:
                value = activate(ACTIVATION, value)
            else:
                first = gates[t]
                if gate_bias is not None:
                    first += tl.load(gate_bias + row, mask=inside, other=0.0)
                value = activate(ACTIVATION, first) * activate_up(ACTIVATION, value)
            bits |= (tl.abs(value) * length >= threshold).to(tl.int32) << (group * T + t)
    tl.store(masks + row, bits, mask=inside)


def name_passing(view: DeviceProxyView, x: torch.Tensor, masks: torch.Tensor, tiling: Tiling | None = None) -> None:
    """Write which neurons pass: bit t of masks[i] is set where neuron i's score for token t reaches the threshold.

    x: f32 [t, d] of 1 to 4 tokens, or a multiple of 4 up to 32, the FFN's input, its rows contiguous; masks: int32 [f],
    contiguous. tiling: for trials. Raises `ValueError` when shapes or types do not fit.
    """
    f, d = view.up.shape
    together, groups = token_groups("name_passing", len(x))
    if x.ndim != 2 or x.shape[1] != d or x.dtype != torch.float32 or x.stride(1) != 1:
        raise ValueError(f"name_passing wants f32 x [t, {d}] of contiguous rows, got {x.dtype} {tuple(x.shape)}")
    if masks.shape != (f,) or masks.dtype != torch.int32 or not masks.is_contiguous():
        raise ValueError(f"name_passing wants contiguous int32 masks ({f},), got {masks.dtype} {tuple(masks.shape)}")
    chosen, kind = tiling or TILINGS[view.up.kind], view.up.kind
    rows = max(1, chosen.rows // triton.next_power_of_2(together))
    gate = None if view.gate is None else view.gate.rows
    _passing_kernel[(triton.cdiv(f, rows),)](
        gate, view.up.rows, view.gate_bias, view.up_bias, view.lengths, view.threshold, x, x.stride(0), masks, f,
        groups, KIND=kind, K=d, T=together, R=rows, C=chosen.columns(kind, d),
        ACTIVATION=activation_word(view.activation), **options(chosen.warps),
    )  # fmt: skip


def scores_ref(view: DeviceProxyView, x: torch.Tensor) -> torch.Tensor:
    """The scores f32 [t, f] of x f32 [t, d], in torch."""

    def product(matrix: DeviceMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        z = x @ matrix.widen().T
        return z if bias is None else z + bias

    up = product(view.up, view.up_bias)
    if view.gate is None:
        return activate_ref(view.activation, up).abs() * view.lengths
    first = activate_ref(view.activation, product(view.gate, view.gate_bias))
    return (first * activate_up_ref(view.activation, up)).abs() * view.lengths


def name_passing_ref(view: DeviceProxyView, x: torch.Tensor, masks: torch.Tensor) -> None:
    """`name_passing` in torch."""
    passes = scores_ref(view, x) >= view.threshold
    bits = passes.int() << torch.arange(len(x), device=x.device, dtype=torch.int32)[:, None]
    masks.copy_(bits.sum(0))
