"""Attention of a prompt's tokens: against the reference, torch's attention and decode attention, token by token."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DEVICE, TYPES, assert_close, random_input

from gpu_kernels.attention import attention_scratch, decode_attention
from gpu_kernels.prompt_attention import Tile, prompt_attention, prompt_attention_ref, tile_for

SMALL = Tile(16, 16, 4, 2)  # a few tokens fill several
TOLERANCES = {("bf16", 2): 5e-5, ("int8", 2): 5e-5}  # by terms; of all others 4e-6: tensor cores cut off sums


def make(heads, kv_heads, head_dim, start, tokens, block_size=32, kind="f16", seed=1):
    """The first arguments of `prompt_attention`, its output and scales; what no token sees is NaN, or a large code."""
    blocks, end = -(-(start + tokens) // block_size), start + tokens
    qkv = random_input(tokens, (heads + 2 * kv_heads) * head_dim, seed).view(tokens, -1, head_dim)
    cache = random_input((blocks + 3) * 2 * kv_heads, block_size * head_dim, seed + 1).view(
        blocks + 3, 2, kv_heads, block_size, head_dim
    )
    table = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(seed))[:blocks]
    unseen = torch.ones(blocks + 3, block_size, dtype=torch.bool)
    unseen[table] = torch.arange(blocks * block_size).view(blocks, block_size) >= end
    cache.transpose(1, 3)[unseen.to(DEVICE)] = torch.nan
    out = torch.full((tokens, heads * head_dim), torch.nan, device=DEVICE)
    table, scales = table.to(DEVICE, torch.int32), None
    if kind == "int8":
        scales = cache.abs().amax(-1) / 127
        cache = (cache / scales[..., None]).nan_to_num(99).round().to(torch.int8)
    positions = torch.arange(start, end, dtype=torch.int32, device=DEVICE)
    return qkv[:, :heads], cache.to(TYPES.get(kind, cache.dtype)), table, positions, out, scales


def check(case, window=None, terms=2, tile=None, tolerance=None):
    q, cache, table, positions, out, scales = case
    expected = torch.empty_like(out)
    prompt_attention_ref(q, cache, table, positions, window, expected, scales)
    prompt_attention(q, cache, table, positions, window, out, scales, terms, tile)
    kind = {dtype: name for name, dtype in TYPES.items()}.get(cache.dtype, "int8")
    assert_close(out, expected, tolerance or TOLERANCES.get((kind, terms), 4e-6))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (6, 2)])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_matches_reference(heads, kv_heads, head_dim):
    check(make(heads, kv_heads, head_dim, 14, 13), tile=SMALL)


@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("window", [None, 30])
def test_types(kind, terms, window):
    check(make(2, 1, 64, 70, 33, kind=kind), window, terms)
    check(make(1, 1, 24, 3, 20, kind=kind), window, terms, SMALL)


@pytest.mark.parametrize("start", [0, 15, 40])
@pytest.mark.parametrize("window", [None, 1, 17, 33, 100])
def test_windows(window, start):
    """Rows of a tile see other first keys, and some none of a tile's."""
    check(make(3, 1, 16, start, 20, 16), window, tile=SMALL)


@pytest.mark.parametrize("block_size", [1, 16, 32, 100, 256])
@pytest.mark.parametrize("tile", [None, SMALL])
def test_blocks_of_any_size(tile, block_size):
    check(make(2, 1, 32, 70, 7, block_size), 40, tile=tile)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
@pytest.mark.parametrize("start", [0, 64])
def test_any_number_of_tokens(start, tokens):
    check(make(1, 1, 64, start, tokens))


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("head_dim", [1, 80, 96, 256])
def test_other_head_sizes(head_dim, kind):
    check(make(1, 1, head_dim, 20, 30, kind=kind))


@pytest.mark.parametrize("kind", ["f16", "bf16", "int8"])
def test_queries_of_any_size_keep_their_bits(kind):
    """Far larger and far smaller than f16 holds, or 0: the softmax then takes one key, or all alike."""
    case = make(2, 1, 16, 0, 8, kind=kind)
    case[0].mul_(10.0 ** torch.tensor([-30.0, -10, -3, 0, 3, 6, 20, 30], device=DEVICE)[:, None, None])
    case[0][2] = 0
    check(case, terms=3, tile=SMALL)


def test_many_small_shares_are_not_lost():
    """One key far above the others, whose shares f16 would not hold, and whose values are large."""
    case = q, cache, table, _, _, _ = make(1, 1, 16, 60, 4, 64)
    q.copy_(torch.eye(16, device=DEVICE)[0] * 4)
    block = cache[table[0], :, 0]
    block[0, :, 0] = torch.where(torch.arange(64, device=DEVICE) == 5, 11.0, 0.0)
    block[1, 5], block[1, :5], block[1, 6:] = 1.0, 2.0**15, 2.0**15
    check(case, tolerance=4e-6)


def test_a_key_that_takes_all_in_any_tile():
    for hot in (0, 17, 39):
        case = make(1, 1, 16, 36, 4, 64)
        case[0].mul_(100)
        case[1][case[2][0], 0, 0, hot] = 5 * case[0][3, 0] / case[0][3, 0].norm()
        check(case, tile=SMALL, tolerance=1e-4)  # scores of hundreds, in f32


def test_is_torchs_attention():
    q, cache, table, positions, out, _ = make(4, 2, 32, 0, 50, 64, "f32")
    prompt_attention(q, cache, table, positions, None, out)
    keys, values = cache[table[0], :, :, :50]
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True
    )
    assert_close(out, y[0].transpose(0, 1).reshape(50, -1), 4e-6)


@pytest.mark.parametrize("kind", ["f16", "int8"])
def test_is_what_decode_does(kind):
    q, cache, table, positions, out, scales = make(2, 1, 24, 60, 3, kind=kind)
    prompt_attention(q, cache, table, positions, 40, out, scales, 3)
    expected, scratch = torch.empty_like(out), attention_scratch(3, 2, 24, 1, DEVICE)
    decode_attention(q, cache, table.expand(3, -1), positions, 40, expected, scratch, scales)
    assert_close(out, expected, 4e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("start", "tokens", "more"), [(0, 1, 40), (37, 3, 1), (14, 20, 60)])
def test_the_last_position_may_be_repeated(start, tokens, more, window):
    """As where a piece of a prompt is filled up: the others come out as without, and what is unseen stays so."""
    q, cache, table, positions, out, _ = make(3, 1, 16, start, tokens, 16)
    filled = torch.cat([positions, (~positions[-1:]).expand(more)])
    queries, found = random_input(tokens + more, 3 * 16).view(-1, 3, 16), torch.full((tokens + more, 48), torch.nan)
    queries[:tokens] = q
    found = found.to(DEVICE)
    prompt_attention(queries, cache, table, filled, window, found, tile=SMALL)
    prompt_attention(q, cache, table, positions, window, out, tile=SMALL)
    assert torch.equal(found[:tokens], out) and found.isfinite().all()
    expected = torch.empty_like(found)
    prompt_attention_ref(queries, cache, table, filled, window, expected)
    assert_close(found, expected, 4e-6)


def test_every_type_and_head_size_has_a_tile():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        for head_dim in (16, 128, 256):
            for terms in (2, 3):
                tile = tile_for(head_dim, dtype, terms)
                assert tile.rows % 16 == tile.keys % 16 == 0


def test_rejects_what_does_not_fit():
    q, cache, table, positions, out, _ = make(4, 2, 16, 5, 6)
    right = {"q": q, "cache": cache, "table": table, "positions": positions, "window": None, "out": out}
    for wrong in (
        {"q": q[:, :3]},
        {"q": q.double()},
        {"q": q[..., :8]},
        {"q": q[:0], "out": out[:0]},
        {"cache": cache.double()},
        {"cache": cache.transpose(0, 1)},
        {"table": table.long()},
        {"table": table[None]},
        {"positions": positions[1:]},
        {"positions": positions.long()},
        {"window": 0},
        {"out": out[:1]},
        {"out": out.double()},
        {"terms": 1},
        {"scales": torch.zeros(cache.shape[:4], device=DEVICE)},
    ):
        with pytest.raises(ValueError, match="prompt_attention"):
            prompt_attention(**{**right, **wrong})
    prompt_attention(**right)
