"""Split-KV decode attention on the GPU: against the reference, torch's attention and the CPU's reference."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DEVICE, TYPES, assert_close, random_input

from cpu_kernels.attention import decode_attention_ref as cpu_attention_ref
from gpu_kernels.attention import attention_scratch, attention_splits, decode_attention, decode_attention_ref


def make(heads, kv_heads, head_dim, positions, capacity=300, block_size=256, kind="f32", splits=3, seed=1):
    """The arguments of `decode_attention` but the window; what no position reaches is NaN, and scratch too."""
    tokens, blocks = len(positions), -(-capacity // block_size)
    qkv = random_input(tokens, (heads + 2 * kv_heads) * head_dim, seed).view(tokens, -1, head_dim)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    cache = random_input(blocks * 2 * kv_heads, block_size * head_dim, seed + 1).view(
        blocks, 2, kv_heads, block_size, head_dim
    )
    for i in range(max(positions) + 1, blocks * block_size):
        cache[table[i // block_size], :, :, i % block_size] = torch.nan
    scratch = attention_scratch(tokens, heads, head_dim, splits, DEVICE)
    for tensor in (scratch.sums, scratch.maxima, scratch.totals):
        tensor.fill_(torch.nan)
    out = torch.full((tokens, heads * head_dim), torch.nan, device=DEVICE)
    table = table.to(DEVICE, torch.int32).expand(tokens, blocks)
    where = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    return qkv[:, :heads], cache.to(TYPES[kind]), table, where, out, scratch


def check(window=None, tolerance=1e-5, **case):
    q, cache, table, positions, out, scratch = make(**case)
    expected = torch.empty_like(out)
    used = cache.nan_to_num()  # the reference multiplies what no position reaches by nothing, but reads it
    decode_attention_ref(q, used, table, positions, window, expected)
    decode_attention(q, cache, table, positions, window, out, scratch)
    assert_close(out, expected, tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (6, 2), (7, 1), (9, 1)])
@pytest.mark.parametrize("head_dim", [24, 128])
def test_matches_reference(heads, kv_heads, head_dim):
    check(heads=heads, kv_heads=kv_heads, head_dim=head_dim, positions=[0, 129], capacity=130, block_size=100)


@pytest.mark.parametrize("head_dim", [1, 64, 80])
def test_other_head_sizes(head_dim):
    check(heads=4, kv_heads=2, head_dim=head_dim, positions=[129], capacity=130, block_size=100)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 17, 100])
def test_windows_and_types(kind, window):
    check(window, heads=2, kv_heads=1, head_dim=24, positions=[0, 16, 17, 140], capacity=200, kind=kind)


@pytest.mark.parametrize("block_size", [1, 17, 64, 100])
@pytest.mark.parametrize("window", [None, 40])
def test_blocks_of_any_size(block_size, window):
    positions = [1, 15, 16, 63, 64, 99]
    check(window, heads=2, kv_heads=1, head_dim=24, positions=positions, capacity=100, block_size=block_size)


@pytest.mark.parametrize("splits", [1, 8, 128])
def test_any_number_of_splits(splits):
    check(heads=2, kv_heads=1, head_dim=16, positions=[290], splits=splits)


def test_large_scores_and_one_key_that_takes_all():
    q, cache, table, positions, out, scratch = make(2, 1, 64, [200])
    cache = cache.nan_to_num()
    q *= 100
    for hot in (0, 100, 200):
        cache[table[0, 0], 0, 0, hot] = 5 * q[0, 0] / q[0, 0].norm()
        expected = torch.empty_like(out)
        decode_attention_ref(q, cache, table, positions, None, expected)
        decode_attention(q, cache, table, positions, None, out, scratch)
        assert_close(out, expected, 2e-4)  # scores of thousands, in f32


def test_is_torchs_attention():
    q, cache, table, positions, out, scratch = make(8, 2, 32, [255], capacity=256)
    decode_attention(q, cache, table, positions, None, out, scratch)
    keys, values = cache[0]
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[None], values[None], enable_gqa=True)
    assert_close(out, y[0, :, 0].reshape(1, -1))


def test_is_what_the_cpu_does():
    q, cache, table, positions, out, scratch = make(6, 2, 24, [130], block_size=64)
    decode_attention(q, cache, table, positions, 70, out, scratch)
    arrays = (q[0].contiguous(), cache.nan_to_num(), table[0].contiguous())
    expected = torch.empty(6, 24)
    cpu_attention_ref(*(a.cpu().numpy() for a in arrays), 131, 70, expected.numpy(), None)
    assert_close(out.view(6, 24), expected)


def test_the_same_again_and_in_company():
    q, cache, table, positions, out, scratch = make(2, 1, 64, [180, 3, 100, 65])
    decode_attention(q, cache, table, positions, 150, out, scratch)
    again, alone = torch.empty_like(out), torch.empty_like(out[:1])
    decode_attention(q, cache, table, positions, 150, again, scratch)
    assert (again == out).all()
    scratch = attention_scratch(1, 2, 64, 3, DEVICE)
    for t in range(4):
        decode_attention(q[t : t + 1], cache, table[t : t + 1], positions[t : t + 1], 150, alone, scratch)
        assert (alone[0] == out[t]).all()


def test_each_token_has_its_own_table():
    q, cache, table, positions, out, scratch = make(2, 1, 24, [40, 99], capacity=200, block_size=20)
    cache, table = cache.nan_to_num(), table.contiguous()
    table[1] = table[1].flip(0)
    expected = torch.empty_like(out)
    decode_attention_ref(q, cache, table, positions, None, expected)
    decode_attention(q, cache, table, positions, None, out, scratch)
    assert_close(out, expected)


def test_split_counts():
    """However many tokens there are."""
    assert attention_splits(32, 2048) == 16
    assert attention_splits(8, 2048) == 32
    assert attention_splits(1, 100000) == 128
    assert attention_splits(1000, 4096) == attention_splits(1, 10) == 1
    for splits in (0, 129):
        with pytest.raises(ValueError, match="splits"):
            attention_scratch(1, 1, 1, splits, DEVICE)


def test_rejects_what_does_not_fit():
    q, cache, table, positions, out, scratch = make(4, 2, 16, [5, 6])
    for wrong in (
        (q[:, :3], cache, table, positions, None, out, scratch),
        (q.double(), cache, table, positions, None, out, scratch),
        (q[..., :8], cache, table, positions, None, out, scratch),
        (q, cache.double(), table, positions, None, out, scratch),
        (q, cache.transpose(0, 1), table, positions, None, out, scratch),
        (q, cache, table.long(), positions, None, out, scratch),
        (q, cache, table[:1], positions, None, out, scratch),
        (q, cache, table, positions[:1], None, out, scratch),
        (q, cache, table, positions.long(), None, out, scratch),
        (q, cache, table, positions, 0, out, scratch),
        (q, cache, table, positions, None, out[:1], scratch),
        (q, cache, table, positions, None, out.double(), scratch),
        (q, cache, table, positions, None, out, attention_scratch(1, 4, 16, 3, DEVICE)),
    ):
        with pytest.raises(ValueError, match="decode_attention"):
            decode_attention(*wrong)


def test_more_tokens_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="1 to 32 tokens, got 33"):
        decode_attention(
            torch.zeros(33, 2, 8), torch.zeros(1, 2, 2, 16, 8), torch.zeros(33, 1, dtype=torch.int32),
            torch.zeros(33, dtype=torch.int32), None, torch.zeros(33, 16), attention_scratch(33, 2, 8, 1, "cpu"),
        )  # fmt: skip


def make_int8(**case):
    """As `make`, with codes and their scales, which are NaN where no position reaches."""
    q, cache, *rest = make(**case)
    scales = cache.abs().amax(-1) / 127
    return (q, (cache / scales[..., None]).nan_to_num(99).round().to(torch.int8), *rest), scales


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 24), (6, 2, 64)])
@pytest.mark.parametrize("window", [None, 17])
def test_int8(heads, kv_heads, head_dim, window):
    case = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "positions": [0, 16, 129], "capacity": 200}
    args, scales = make_int8(**case, block_size=100)
    (q, codes, table, positions, out, _), expected, exact = args, torch.empty_like(args[4]), torch.empty_like(args[4])
    decode_attention_ref(q, codes, table, positions, window, expected, None, scales.nan_to_num())
    decode_attention(*args[:4], window, out, args[5], scales)
    assert_close(out, expected)
    plain = make(**case, block_size=100)[1].nan_to_num()
    decode_attention_ref(q, plain, table, positions, window, exact)
    assert 1e-4 < float((out - exact).abs().max()) < 0.05  # what the rounding costs


def test_scales_belong_to_int8_alone():
    args, scales = make_int8(heads=2, kv_heads=1, head_dim=16, positions=[5])
    wide = scales.new_zeros(args[1].shape)
    for cache, given in ((args[1], None), (wide, scales), (args[1], scales[:0]), (args[1], scales.double())):
        with pytest.raises(ValueError, match="f32 scales"):
            decode_attention(args[0], cache, *args[2:4], None, *args[4:], given)
