"""Low-rank MLP predictor on the GPU: which neurons are expected to fire. Weights are int8 with a scale per row.

    hidden[t, k] = relu(s1[k] * (fc1[k] . x[t]) + b1[k])
    masks[i]     = sum over t of 2^t  where  s2[i] * (fc2[i] . hidden[t]) + b2[i] >= threshold

Codes are padded with zeros to whole groups of 128 columns, as on the CPU. They are multiplied in f32 by inputs in f32;
the CPU rounds inputs to 16 bits, so a neuron right at the threshold may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu_kernels.matrix import padded

# A thread's share of a tile is 8 loads of 16 codes in both: with d = 4096, r = 1024 and f = 11008, every code is asked
# for at once, by programs that all fit on an H100. More rows share the loads of x, fewer make more programs.
_HIDDEN_ROWS, _HIDDEN_COLUMNS, _HIDDEN_WARPS = 8, 4096, 8
_FIRING_ROWS, _FIRING_COLUMNS, _FIRING_WARPS = 16, 1024, 4
MAX_TOKENS = 8  # bits of a mask


@dataclass(frozen=True, eq=False)
class PredictorView:
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
    ) -> PredictorView:
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
def _products(weight, rows, n, v, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """fc[rows] . v as f32 [ROWS], of codes [n, WIDTH] and an input of D elements; 0 for rows from n on."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    lines = weight + rows.to(tl.int64)[:, None] * WIDTH
    for start in tl.static_range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        here = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        codes = tl.load(lines + columns[None, :], mask=here, other=0)
        total += codes.to(tl.float32) * tl.load(v + columns, mask=columns < D, other=0.0)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    fc1, s1, b1, x, hidden, r, TOKENS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """hidden[t, rows of this program] of all tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale, bias = tl.load(s1 + rows, mask=rows < r, other=0.0), tl.load(b1 + rows, mask=rows < r, other=0.0)
    for t in range(TOKENS):
        sums = _products(fc1, rows, r, x + t * D, D, WIDTH, ROWS, COLUMNS)
        tl.store(hidden + t * r + rows, tl.maximum(sums * scale + bias, 0.0), mask=rows < r)


@triton.jit
def _firing_kernel(  # type: ignore[no-untyped-def]
    fc2, s2, b2, threshold, hidden, masks, f, TOKENS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """masks[rows of this program]; later tokens find the codes in the cache."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale, bias = tl.load(s2 + rows, mask=rows < f, other=0.0), tl.load(b2 + rows, mask=rows < f, other=0.0)
    bits = tl.zeros((ROWS,), tl.int32)
    for t in range(TOKENS):
        sums = _products(fc2, rows, f, hidden + t * R, R, WIDTH, ROWS, COLUMNS)
        bits |= (sums * scale + bias >= threshold).to(tl.int32) << t
    tl.store(masks + rows, bits.to(tl.uint8), mask=rows < f)


def predict(view: PredictorView, x: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> None:
    """Write which neurons are predicted to fire: bit t of masks[i] is set where neuron i fires for token t.

    x: f32 [t, d] of 1 to 8 tokens, the FFN's input; hidden: f32 [t, r] scratch; masks: uint8 [f]; all contiguous.
    Raises `ValueError` when shapes or types do not fit.
    """
    r, f = len(view.b1), len(view.b2)
    _check(view, x, hidden, masks)
    first = (view.fc1, view.s1, view.b1, x, hidden, r, len(x), view.d, view.fc1.shape[1], _HIDDEN_ROWS)
    columns = min(_HIDDEN_COLUMNS, triton.next_power_of_2(view.fc1.shape[1]))
    _hidden_kernel[(triton.cdiv(r, _HIDDEN_ROWS),)](*first, columns, num_warps=_HIDDEN_WARPS)
    second = (view.fc2, view.s2, view.b2, view.threshold, hidden, masks, f, len(x), r, view.fc2.shape[1], _FIRING_ROWS)
    columns = min(_FIRING_COLUMNS, triton.next_power_of_2(view.fc2.shape[1]))
    _firing_kernel[(triton.cdiv(f, _FIRING_ROWS),)](*second, columns, num_warps=_FIRING_WARPS)


def _check(view: PredictorView, x: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> None:
    if x.ndim != 2 or not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"predict wants x of 1 to {MAX_TOKENS} tokens, got {tuple(x.shape)}")
    wanted = (
        ("x", x, torch.float32, (len(x), view.d)),
        ("hidden", hidden, torch.float32, (len(x), len(view.b1))),
        ("masks", masks, torch.uint8, (len(view.b2),)),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"predict wants contiguous {dtype} {name} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def predict_ref(view: PredictorView, x: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> None:
    """`predict` in torch."""
    hidden.copy_(torch.relu(x @ view.fc1[:, : view.d].float().T * view.s1 + view.b1))
    fires = hidden @ view.fc2[:, : hidden.shape[1]].float().T * view.s2 + view.b2 >= view.threshold
    bits = fires.int() << torch.arange(len(x), device=x.device, dtype=torch.int32)[:, None]
    masks.copy_(bits.sum(0))
