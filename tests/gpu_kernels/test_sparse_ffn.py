"""GPU sparse FFN: every kind, none, one or all rows active, masks of tokens, biases, skipping, parts, refusals."""

import pytest
import torch
from gpu_cases import DEVICE, KINDS, assert_close, random_input, random_matrix

from gpu_kernels.sparse_ffn import (
    DOWN_COLUMNS,
    DOWN_PROGRAMS,
    DeviceFFNView,
    FFNTiling,
    Tiling,
    down_parts,
    sparse_ffn,
    sparse_ffn_ref,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
PARTS = 3


def random_ffn(kind, f=23, d=129, activation="relu", gated=True, biased=False):
    gate, up, down = (random_matrix(f, d, kind, seed) for seed in (1, 2, 3))
    biases = [random_input(1, f, seed)[0] if biased else None for seed in (4, 5)]
    return DeviceFFNView(gate if gated else None, up, down, biases[0] if gated else None, biases[1], activation)


def random_list(f, capacity, count, seed=6):
    """ids, count and masks; what lies beyond the count must not matter, so it is out of range."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((capacity,), 2**31 - 1, dtype=torch.int32)
    ids[:count] = torch.randperm(f, generator=generator)[:count].sort().values.int()
    masks = torch.randint(0, 2**32, (capacity,), generator=generator).to(torch.int32)  # bit 31 is the sign
    return ids.to(DEVICE), torch.tensor([count], dtype=torch.int32, device=DEVICE), masks.to(DEVICE)


def check(ffn, tokens, count, use_masks=False, parts=PARTS, **options):
    """`sparse_ffn` against its reference: hidden where it is active, and the sum of the parts."""
    f, d = ffn.up.shape
    x = random_input(tokens, d)
    ids, number, masks = random_list(f, f + 5, count)
    given = masks if use_masks else None
    found, expected = (
        (torch.full((tokens, f + 5), 7.0, device=DEVICE), torch.full((parts, tokens, d), 7.0, device=DEVICE))
        for _ in range(2)
    )
    sparse_ffn(ffn, x, ids, number, given, *found, **options)
    sparse_ffn_ref(ffn, x, ids, number, given, *expected)
    if count:
        assert_close(found[0][:, :count], expected[0][:, :count])
    assert (found[0][:, count:] == 7).all(), "written beyond the count"
    assert_close(found[1].sum(0), expected[1].sum(0))
    return found


@every_kind
@pytest.mark.parametrize("count", [0, 1, 23])
def test_none_one_and_all_rows(kind, count):
    hidden, parts = check(random_ffn(kind), 1, count)
    if not count:
        assert (parts == 0).all() and (hidden == 7).all()


@every_kind
def test_tokens_that_want_different_rows(kind):
    check(random_ffn(kind), 3, 11, use_masks=True, parts=2)


@pytest.mark.parametrize(("kind", "tokens"), [("bf16", 8), ("int4", 8), ("bf16", 32)])
def test_groups_of_tokens(kind, tokens):
    check(random_ffn(kind, f=9), tokens, 9, use_masks=True, parts=1)


def test_rows_of_another_group_are_not_read():
    """Of 16 tokens, each half wants rows of its own."""
    ffn, x = random_ffn("f32", f=4), random_input(16, 129)
    ids, count = torch.arange(4, dtype=torch.int32, device=DEVICE), torch.tensor([4], dtype=torch.int32, device=DEVICE)
    masks = torch.tensor([1 << 3, 1 << 11, 0xFF00, 0x00FF], dtype=torch.int32, device=DEVICE)
    found, expected = ((torch.empty(16, 4, device=DEVICE), torch.empty(2, 16, 129, device=DEVICE)) for _ in range(2))
    sparse_ffn(ffn, x, ids, count, masks, *found)
    sparse_ffn_ref(ffn, x, ids, count, masks, *expected)
    assert_close(found[0], expected[0])
    assert_close(found[1].sum(0), expected[1].sum(0))
    for rows in (ffn.gate.rows, ffn.up.rows):
        rows[[1, 2]] = float("nan")
    sparse_ffn(ffn, x, ids, count, masks, *found)
    assert_close(found[0][:8], expected[0][:8])


@every_kind
def test_more_columns_than_a_step_and_more_rows_than_a_step(kind):
    ffn = random_ffn(kind, f=40, d=300)
    check(ffn, 1, 40, parts=1, tiling=FFNTiling(Tiling(2, 1, 1), 2, 1))


def test_rows_are_shared_by_persistent_programs(monkeypatch):
    monkeypatch.setattr("gpu_kernels.sparse_ffn.PROGRAMS", 2)
    check(random_ffn("bf16"), 2, 23, use_masks=True)


@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu_tanh", "fatrelu_0.3", "drelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_biases(activation, gated):
    check(random_ffn("f16", activation=activation, gated=gated, biased=True), 2, 19, use_masks=True)


def test_skipping_changes_nothing_but_what_is_read():
    """Rows of up whose activation is 0 may hold anything when they are skipped."""
    ffn = random_ffn("f32")
    skipped, every = check(ffn, 1, 23, skip=True), check(ffn, 1, 23, skip=False)
    assert_close(skipped[0], every[0], 1e-6)
    assert_close(skipped[1], every[1], 1e-6)
    silent = (skipped[0][0, :23] == 0).nonzero()[:, 0]
    assert 0 < len(silent) < 23
    ids = random_list(23, 28, 23)[0]
    ffn.up.rows[ids[silent].long()] = float("nan")
    ffn.down.rows[ids[silent].long()] = float("nan")
    x, count = random_input(1, 129), torch.tensor([23], dtype=torch.int32, device=DEVICE)
    hidden, parts = torch.empty_like(skipped[0]), torch.empty_like(skipped[1])
    sparse_ffn(ffn, x, ids, count, None, hidden, parts)
    assert torch.equal(parts, skipped[1])


def test_a_row_may_be_listed_under_any_order_and_the_sum_is_repeated_exactly():
    ffn = random_ffn("bf16")
    first, second = check(ffn, 2, 23), check(ffn, 2, 23)
    assert torch.equal(first[1], second[1])


def test_parts_fill_the_gpu():
    for d in (2048, 4096, 5120, 8192):
        programs = down_parts(d) * -(-d // DOWN_COLUMNS)
        assert 0.8 * DOWN_PROGRAMS <= programs <= DOWN_PROGRAMS
    assert down_parts(17) > 1 and down_parts(10**6) == 1


def test_a_view_refuses_misfits():
    up, other, bias = random_matrix(4, 64, "bf16"), random_matrix(5, 64, "bf16"), torch.zeros(5, device=DEVICE)
    with pytest.raises(ValueError, match="unknown activation"):
        DeviceFFNView(None, up, up, None, None, "tanh")
    with pytest.raises(ValueError, match="gate is"):
        DeviceFFNView(other, up, up, None, None, "relu")
    with pytest.raises(ValueError, match="down is"):
        DeviceFFNView(None, up, random_matrix(4, 64, "f16"), None, None, "relu")
    with pytest.raises(ValueError, match="up_bias is"):
        DeviceFFNView(None, up, up, None, bias, "relu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 129)}, "1 to 4 tokens, or a multiple of 4 up to 32, got 9"),
        ({"x": torch.zeros(2, 128)}, "wants x"),
        ({"ids": torch.zeros(30, dtype=torch.int64)}, "wants ids"),
        ({"count": torch.zeros(2, dtype=torch.int32)}, "wants count"),
        ({"masks": torch.zeros(29, dtype=torch.int32)}, "wants masks"),
        ({"hidden": torch.zeros(2, 29)}, "wants hidden"),
        ({"parts": torch.zeros(129, 2, 3).permute(2, 1, 0)}, "contiguous"),
    ],
)
def test_misfits_are_refused(change, message):
    given = {
        "x": torch.zeros(2, 129),
        "ids": torch.zeros(30, dtype=torch.int32),
        "count": torch.zeros(1, dtype=torch.int32),
        "masks": None,
        "hidden": torch.zeros(2, 30),
        "parts": torch.zeros(3, 2, 129),
    } | change
    with pytest.raises(ValueError, match=message):
        sparse_ffn(random_ffn("bf16"), **{name: None if v is None else v.to(DEVICE) for name, v in given.items()})
