"""RoPE, QK norm and the write into the KV cache on the GPU: against the reference and the CPU's kernel."""

import math

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, TYPES, assert_close, random_input
from matrix_cases import rounded_codes

from cpu_kernels.rope import QKNorm
from cpu_kernels.rope import rope_ref as cpu_rope_ref
from gpu_kernels.rope import rope, rope_ref

EPS, BLOCK_SIZE = 1e-6, 4
TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3}


def make(tokens, heads, kv_heads, head_dim, rotated=True, normed=False, kind="f32"):
    """The arguments of `rope`; blocks of a sequence are not in the cache's order, and each token has its own."""
    qkv = random_input(tokens, (heads + 2 * kv_heads) * head_dim)
    angles = 3 * random_input(3 * BLOCK_SIZE, head_dim // 2, seed=2)
    rotation = (angles.cos(), angles.sin()) if rotated else (None, None)
    norm = tuple(random_input(2, head_dim, seed=3)) if normed else (None, None)
    biases = tuple(random_input(2, head_dim, seed=5)) if normed == "layer" else (None, None)
    positions = torch.tensor([0, 3, 4, 11] * 9, dtype=torch.int32, device=DEVICE)[:tokens]
    order = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(4)).to(DEVICE, torch.int32)
    cache = torch.full((3 * tokens, 2, kv_heads, BLOCK_SIZE, head_dim), torch.nan, dtype=TYPES[kind], device=DEVICE)
    return [qkv, *rotation, *norm, EPS, positions, order.view(tokens, 3), cache, heads, *biases]


def both(*args, **options):
    """qkv and cache after the kernel, and after the reference."""
    found, truth = make(*args, **options), make(*args, **options)
    rope(*found)
    rope_ref(*truth)
    return (found[0], found[8]), (truth[0], truth[8])


def assert_same_cache(found, truth, tolerance):
    assert (found.isnan() == truth.isnan()).all(), "another place was written"
    assert_close(found.nan_to_num(), truth.nan_to_num(), tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [2, 24, 80, 128])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normed", ["layer", True, False])
def test_matches_reference(heads, kv_heads, head_dim, rotated, normed):
    found, truth = both(4, heads, kv_heads, head_dim, rotated, normed)
    assert_close(found[0], truth[0])
    assert_same_cache(found[1], truth[1], TOLERANCE["f32"])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(5, 1, 24), (8, 4, 64)])
@pytest.mark.parametrize("normed", ["layer", True, False])
def test_many_tokens(heads, kv_heads, head_dim, normed):
    """A program then takes eight heads, of which there may be fewer, or some of several kinds."""
    found, truth = both(34, heads, kv_heads, head_dim, normed=normed)
    assert_close(found[0], truth[0])
    assert_same_cache(found[1], truth[1], TOLERANCE["f32"])


@pytest.mark.parametrize("tokens", [4, 33])
@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_what_is_not_to_be_kept_is_not(kind, tokens):
    """Tokens with the complement of their position: turned as others are, and the cache stays as it is there."""
    found, truth = (
        make(tokens, 4, 2, 24, normed=True) if kind == "f32" else make_int8(tokens, 4, 2, 24, normed=True)
        for _ in range(2)
    )
    whole = [x.clone() if isinstance(x, torch.Tensor) else x for x in found]
    for case in (found, truth):
        case[6][2:] = ~case[6][2:]
    for case in (found, whole):
        rope(*case)
    rope_ref(*truth)
    assert torch.equal(found[0], whole[0])
    assert_same_cache(found[8].float(), truth[8].float(), 1e-5 if kind == "f32" else 0.02)
    blocks = found[7][2:].flatten().long()
    before = (make if kind == "f32" else make_int8)(tokens, 4, 2, 24, normed=True)
    assert torch.equal(found[8][blocks].nan_to_num(), before[8][blocks].nan_to_num())
    if kind == "int8":
        assert torch.equal(found[12][blocks].nan_to_num(), before[12][blocks].nan_to_num())


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_cache(kind):
    found, truth = both(2, 2, 1, 64, normed=True, kind=kind)
    assert_close(found[0], truth[0])
    assert_same_cache(found[1], truth[1], TOLERANCE[kind])


def test_what_f16_cannot_hold_is_kept_as_its_largest():
    args = make(1, 1, 1, 24, rotated=False, kind="f16")
    qkv, cache = args[0], args[8]
    qkv[0, -3:] = torch.tensor([1e5, -torch.inf, torch.nan])
    rope(*args)
    kept = cache[~cache.isnan().all(-1)][-1, -3:].tolist()
    assert kept[:2] == [65504, -65504] and math.isnan(kept[2])


def test_values_and_keys_in_qkv_stay_and_odd_heads_without_rotation():
    args = make(1, 3, 1, 17, rotated=False)
    qkv, cache = args[0].clone(), args[8]
    rope(*args)
    assert (args[0] == qkv).all()
    assert (cache[args[7][0, 0], :, :, 0] == qkv[0, 3 * 17 :].view(2, 1, 17)).all()
    assert cache.isfinite().sum() == 2 * 17
    args = make(1, 3, 1, 16, normed=True)
    qkv = args[0].clone()
    rope(*args)
    assert (args[0][:, 3 * 16 :] == qkv[:, 3 * 16 :]).all()
    assert (args[8][args[7][0, 0], 1, :, 0] == qkv[0, 4 * 16 :]).all(), "values are neither normed nor rotated"


def test_one_sequence_shares_its_table():
    args, own = make(4, 2, 1, 10), make(4, 2, 1, 10)
    args[7] = args[7][:1].expand(4, 3)
    own[7] = args[7].contiguous()
    rope(*args)
    rope(*own)
    assert (args[0] == own[0]).all()
    assert_same_cache(args[8], own[8], 0)
    assert (~args[8].isnan()).sum() == 4 * 2 * 10


@pytest.mark.parametrize("normed", ["layer", True, False])
def test_is_what_the_cpu_does(normed):
    args = make(1, 4, 2, 24, normed=normed)
    args[6][0] = 6
    arrays = [None if a is None else a.cpu().numpy().copy() for a in (*args[:5], args[8])]
    qkv, cos, sin, q_norm, k_norm, cache = arrays
    norm = QKNorm(*((np.empty(0, np.float32),) * 2 if q_norm is None else (q_norm, k_norm)), EPS)
    if normed == "layer":
        norm = norm._replace(q_bias=args[10].cpu().numpy(), k_bias=args[11].cpu().numpy())
    cpu_rope_ref(qkv.reshape(-1, 24), (cos[6], sin[6]), norm, cache, args[7][0].cpu().numpy(), 6, None)
    rope(*args)
    assert_close(args[0][:, : 4 * 24], torch.from_numpy(qkv)[:, : 4 * 24])
    assert_same_cache(args[8].cpu(), torch.from_numpy(cache), 1e-5)


def test_rejects_what_does_not_fit():
    for place, wrong in (
        (0, random_input(2, 65)),
        (0, random_input(2, 64).double()),
        (1, None),
        (1, random_input(12, 7)),
        (3, None),
        (4, random_input(1, 15)[0]),
        (6, torch.zeros(2, dtype=torch.int64, device=DEVICE)),
        (6, torch.zeros(1, dtype=torch.int32, device=DEVICE)),
        (7, torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)),
        (7, torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)),
        (8, random_input(6, 2 * 4 * 16).view(6, 2, 1, 4, 16).double()),
        (8, random_input(6, 2 * 8 * 16).view(6, 2, 1, 8, 16)[:, :, :, ::2]),
        (9, 3),
    ):
        args = make(2, 2, 1, 16, normed=True)
        args[place] = wrong
        with pytest.raises(ValueError, match="rope"):
            rope(*args)


def make_int8(*args, **options):
    """As `make`, with codes, and scales of NaN."""
    given = make(*args, **options)
    scales = torch.full(given[8].shape[:4], torch.nan, device=DEVICE)
    given[8] = torch.full(given[8].shape, 99, dtype=torch.int8, device=DEVICE)
    return [*given, *(None,) * (12 - len(given)), scales]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 17), (4, 2, 64)])
@pytest.mark.parametrize("tokens", [4, 33])
def test_int8(tokens, heads, kv_heads, head_dim):
    options = {"rotated": head_dim % 2 == 0, "normed": True}
    found, truth = (make_int8(tokens, heads, kv_heads, head_dim, **options) for _ in range(2))
    rope(*found)
    rope_ref(*truth)
    assert_same_cache(found[12], truth[12], TOLERANCE["f32"])
    off = (found[8].int() - truth[8].int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01  # where f64 and f32 round a half apart


def test_codes_are_those_of_the_cpu():
    """Halves, zeros, and numbers too small for a normal scale."""
    rows = random_input(6, 24)
    rows[0, 0], rows[1], rows[2] = 127, 0, rows[2] * 1e-42
    rows[0, 1:6] = torch.tensor([0.5, 1.5, -2.5, 126.5, -127])
    args = make_int8(1, 1, 3, 24, rotated=False)
    args[0] = torch.cat((rows[:1], rows)).view(1, -1)
    rope(*args)
    codes, scales = rounded_codes(rows.cpu())
    block = int(args[7][0, 0])
    assert torch.equal(args[8][block, :, :, 0].flatten(0, 1).cpu(), codes)
    assert torch.equal(args[12][block, :, :, 0].flatten().cpu(), scales)
    assert codes[0, :6].tolist() == [127, 0, 2, -2, 126, -127]


def test_a_broken_value_shows_in_its_scale():
    args = make_int8(1, 1, 1, 24, rotated=False)
    args[0][0, -3] = torch.nan
    rope(*args)
    scales = args[12][args[7][0, 0], :, 0, 0]
    assert scales[0].isfinite() and scales[1].isnan()
