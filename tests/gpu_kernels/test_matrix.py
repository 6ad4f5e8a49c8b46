"""`DeviceMatrix`: byte for byte the CPU's rows, and a kind that kernels do not know is refused where rows are read."""

import pytest
import torch
import triton
import triton.language as tl
from gpu_cases import DEVICE, KINDS, random_matrix

from cpu_kernels.contract import LAYOUTS
from gpu_kernels.gemv import TILINGS as GEMV_TILINGS
from gpu_kernels.matrix import DeviceMatrix
from gpu_kernels.sparse_ffn import TILINGS as FFN_TILINGS
from gpu_kernels.tiles import VECTOR, add_rows, row_dots


def test_every_type_is_listed_everywhere():
    assert set(KINDS) == set(LAYOUTS) == set(GEMV_TILINGS) == set(FFN_TILINGS) == set(VECTOR) - {"codes"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_width_or_type_are_refused(kind):
    matrix = random_matrix(3, 33, kind)
    assert matrix.rows.shape == (3, LAYOUTS[kind].elements(33)) and matrix.shape == (3, 33)
    for rows in (matrix.rows[:, 1:].contiguous(), matrix.rows.to(torch.float64), matrix.rows.T.contiguous().T):
        with pytest.raises(ValueError, match=f"{kind} rows of 33 weights are contiguous"):
            DeviceMatrix(rows, 33, kind)
    with pytest.raises(ValueError, match="unknown kind 'int3', expected one of bf16"):
        DeviceMatrix(matrix.rows, 33, "int3")


@triton.jit
def _dots(w, ids, x, out, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 2)
    (found,) = row_dots(w, tl.load(ids + at), at < 2, x, 128, KIND, 128, 1, 2, 128)
    tl.store(out + at, found)


@triton.jit
def _sums(w, ids, x, out, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 2)
    (found,) = add_rows(
        (tl.zeros((1, 128), tl.float32),), w, tl.load(ids + at), at < 2, (tl.load(x + at),), 0, KIND, 128, 1, 2, 1, 128
    )
    tl.store(out + tl.arange(0, 128), tl.sum(found, 0))


@pytest.mark.parametrize("kernel", [_dots, _sums])
def test_no_kernel_takes_rows_of_an_unknown_kind_for_another(kernel):
    floats = torch.ones(2, 128, dtype=torch.bfloat16, device=DEVICE)
    ids, x, out = torch.arange(2, device=DEVICE), torch.ones(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    kernel[(1,)](floats, ids, x, out, KIND="bf16")
    assert out[:2].tolist() == ([128.0, 128.0] if kernel is _dots else [2.0, 2.0])
    with pytest.raises(Exception) as refused:
        kernel[(1,)](floats, ids, x, out, KIND="int3")
    reasons, error = "", refused.value
    while error is not None:  # the compiler names the caller first, and what it met there as the cause
        reasons, error = f"{reasons}{error}", error.__cause__ or error.__context__
    assert "unknown kind of rows" in reasons
