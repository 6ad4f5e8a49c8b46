"""Low-rank MLP predictor on the GPU: which neurons are expected to fire. Weights are int8 with a scale per row.

    hidden[t, k] = relu(s1[k] * (fc1[k] . x[t]) + b1[k])
    masks[i]     = sum over t of 2^t  where  s2[i] * (fc2[i] . hidden[t]) + b2[i] >= threshold

Codes are padded with zeros to whole groups of 128 columns, as on the CPU. They are multiplied in f32 by inputs in f32;
the CPU rounds inputs to 16 bits, so a neuron right at the threshold may differ. A token's bits do not depend on how
many tokens there are: each of a program's rows is summed by all its threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import padded
from gpu_kernels.gemv import Tiling
from gpu_kernels.launch import begin, options
from gpu_kernels.tiles import load_step, program_in_group, row_dots, token_groups


@dataclass(frozen=True)
class PredictorTiling:
    """How programs read fc1, and how they read fc2."""

    hidden: Tiling
    firing: Tiling


# All loads of a program are under way at once, and its programs all fit on an H100: 256 of fc1 for r = 1024, 2752 of
# fc2 for f = 11008. The best of a few measured within the decode step of a 7B shape on an H200.
TILING = PredictorTiling(Tiling(4, 1, 8), Tiling(4, 1, 2))


@dataclass(frozen=True, eq=False)
class DevicePredictorView:
    """One layer's predictor as the kernels see it; contiguous tensors of one device. Raises `ValueError`.

    fc1: int8 [r, padded(d)] and fc2: int8 [f, padded(r)]; s1, b1: [r] and s2, b2: [f] f32.
    """

    fc1: torch.Tensor
    s1: torch.Tensor
    b1: torch.Tensor
    fc2: torch.Tensor
    s2: torch.Tensor
    b2: torch.Tensor
    threshold: float
    d: int

    def __post_init__(self) -> None:
        r, f = len(self.b1), len(self.b2)
        shapes = {"fc1": (r, padded(self.d)), "s1": (r,), "b1": (r,), "fc2": (f, padded(r)), "s2": (f,), "b2": (f,)}
        for name, shape in shapes.items():
            part, dtype = getattr(self, name), torch.int8 if name.startswith("fc") else torch.float32
            if part.shape != shape or part.dtype != dtype or not part.is_contiguous():
                raise ValueError(
                    f"predictor's {name} is contiguous {dtype} {shape}, got {part.dtype} {tuple(part.shape)}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes on the device, which is what predicting for one token reads."""
        return sum(part.nbytes for part in (self.fc1, self.s1, self.b1, self.fc2, self.s2, self.b2))

    @classmethod
    def of(
        cls,
        fc1: torch.Tensor,
        s1: torch.Tensor,
        b1: torch.Tensor,
        fc2: torch.Tensor,
        s2: torch.Tensor,
        b2: torch.Tensor,
        threshold: float,
        device: torch.device | str,
    ) -> DevicePredictorView:
        """On `device`, from fc1 int8 [r, d] and fc2 int8 [f, r], which are padded here, and floats s1, b1, s2, b2.

        Raises `ValueError` when shapes do not fit.
        """
        first, second = (pad_codes(fc.to(device)) for fc in (fc1, fc2))
        v1, w1, v2, w2 = (part.to(device).float().contiguous() for part in (s1, b1, s2, b2))
        return cls(first, v1, w1, second, v2, w2, float(threshold), fc1.shape[1])


def pad_codes(codes: torch.Tensor) -> torch.Tensor:
    """Contiguous int8 [n, m] with zeros added to whole groups of columns."""
    return torch.nn.functional.pad(codes, (0, padded(codes.shape[1]) - codes.shape[1])).contiguous()


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    fc1, s1, b1, x, hidden, r, groups, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """hidden[t, R rows of this program] of T of the tokens."""
    program, token = program_in_group(T, groups)
    row = program * R + tl.arange(0, R)
    inside = row < r
    step = load_step(fc1, row.to(tl.int64), inside, 0, "codes", K, R, C)
    scale, bias = tl.load(s1 + row, mask=inside, other=0.0), tl.load(b1 + row, mask=inside, other=0.0)
    begin(PDL)
    dots = row_dots(fc1, row.to(tl.int64), inside, x + token * K, K, "codes", K, T, R, C, step)
    for t in tl.static_range(T):
        tl.store(hidden + (token + t) * r + row, tl.maximum(dots[t] * scale + bias, 0.0), mask=inside)


@triton.jit
def _firing_kernel(  # type: ignore[no-untyped-def]
    fc2, s2, b2, threshold, hidden, masks, f, groups, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """masks[R rows of this program], of all groups of T tokens."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < f
    step = load_step(fc2, row.to(tl.int64), inside, 0, "codes", K, R, C)
    scale, bias = tl.load(s2 + row, mask=inside, other=0.0), tl.load(b2 + row, mask=inside, other=0.0)
    begin(PDL)
    bits = tl.zeros((R,), tl.int32)
    for group in range(groups):
        dots = row_dots(fc2, row.to(tl.int64), inside, hidden + group * T * K, K, "codes", K, T, R, C, step)
        for t in tl.static_range(T):
            bits |= (dots[t] * scale + bias >= threshold).to(tl.int32) << (group * T + t)
    tl.store(masks + row, bits, mask=inside)


def predict(
    view: DevicePredictorView,
    x: torch.Tensor,
    hidden: torch.Tensor,
    masks: torch.Tensor,
    tiling: PredictorTiling = TILING,
) -> None:
    """Write which neurons are predicted to fire: bit t of masks[i] is set where neuron i fires for token t.

    x: f32 [t, d] of 1 to 4 tokens, or a multiple of 4 up to 32, the FFN's input; hidden: f32 [t, r] scratch; masks:
    int32 [f]; all contiguous.
    tiling: for trials. Raises `ValueError` when shapes or types do not fit.
    """
    r, f = len(view.b1), len(view.b2)
    together, groups = token_groups("predict", len(x))
    _check(view, x, hidden, masks)
    first, second = _sizes(tiling.hidden, view.d, together), _sizes(tiling.firing, r, together)
    _hidden_kernel[(triton.cdiv(r, first["R"]) * groups,)](view.fc1, view.s1, view.b1, x, hidden, r, groups, **first)
    _firing_kernel[(triton.cdiv(f, second["R"]),)](
        view.fc2, view.s2, view.b2, view.threshold, hidden, masks, f, groups, **second
    )


def _sizes(tiling: Tiling, columns: int, tokens: int) -> dict[str, Any]:
    """Constants of a kernel. Of several tokens a program takes fewer rows, of short rows fewer warps read one."""
    width = tiling.columns("codes", columns)
    rows = min(tiling.rows, 16 // triton.next_power_of_2(tokens))
    warps = max(1, min(tiling.warps, width // 512))
    return {"K": columns, "T": tokens, "R": rows, "C": width, **options(warps)}


def _check(view: DevicePredictorView, x: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"predict wants x [t, {view.d}], got {tuple(x.shape)}")
    wanted = (
        ("x", x, torch.float32, (len(x), view.d)),
        ("hidden", hidden, torch.float32, (len(x), len(view.b1))),
        ("masks", masks, torch.int32, (len(view.b2),)),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"predict wants contiguous {dtype} {name} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def predict_ref(view: DevicePredictorView, x: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> None:
    """`predict` in torch."""
    hidden.copy_(torch.relu(x @ view.fc1[:, : view.d].float().T * view.s1 + view.b1))
    fires = hidden @ view.fc2[:, : hidden.shape[1]].float().T * view.s2 + view.b2 >= view.threshold
    bits = fires.int() << torch.arange(len(x), device=x.device, dtype=torch.int32)[:, None]
    masks.copy_(bits.sum(0))
