"""The sparse FFN of many rows on tensor cores: lists of none, one and all, masks, biases, without a gate, refusals."""

import pytest
import torch
from gpu_cases import DEVICE, assert_close, random_input, random_matrix

from gpu_kernels.row_ffn import ffn_floats, takes_ffn
from gpu_kernels.sparse_ffn import DeviceFFNView, sparse_ffn, sparse_ffn_ref


def random_ffn(f, d, activation="relu", gated=True, biased=False):
    gate, up, down = (random_matrix(f, d, "bf16", seed) for seed in (1, 2, 3))
    biases = [random_input(1, f, seed)[0] if biased else None for seed in (4, 5)]
    return DeviceFFNView(gate if gated else None, up, down, biases[0] if gated else None, biases[1], activation)


def run(kernel, ffn, x, rows, masks=None, parts=2, scratch=None):
    """hidden and parts, of a list with room for 5 more rows, which are out of range."""
    tokens, capacity = len(x), len(ffn.up.rows) + 5
    ids = torch.full((capacity,), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    ids[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    count = torch.tensor([len(rows)], dtype=torch.int32, device=DEVICE)
    hidden = torch.full((tokens, capacity), 7.0, device=DEVICE)
    out = torch.full((parts, tokens, ffn.up.columns), 7.0, device=DEVICE)
    kernel(ffn, x, ids, count, masks, hidden, out, scratch=scratch)
    return hidden, out


def scratch_for(ffn, tokens):
    """Of what no sum can hide."""
    size = ffn_floats(tokens, len(ffn.up.rows) + 5, ffn.up.columns, ffn.gate is not None)
    return torch.full((size,), torch.nan, device=DEVICE)


def check(ffn, tokens, rows, masks=None, parts=2):
    x = random_input(tokens, ffn.up.columns)
    hidden, out = run(sparse_ffn, ffn, x, rows, masks, parts, scratch_for(ffn, tokens))
    expected = run(sparse_ffn_ref, ffn, x, rows, masks, parts)
    if rows:
        assert_close(hidden[:, : len(rows)], expected[0][:, : len(rows)], 2e-6)
    assert (hidden[:, len(rows) :] == 7).all(), "written beyond the count"
    assert_close(out.sum(0), expected[1].sum(0), 2e-6)
    return hidden, out


@pytest.mark.parametrize("rows", [[], [5], list(range(9))])
def test_none_one_and_all_rows(rows):
    _, parts = check(random_ffn(9, 17), 8, rows)
    assert bool((parts == 0).all()) == (not rows)


def test_lists_and_columns_of_several_tiles():
    """Parts of the list that end within a tile, of the columns within a step."""
    check(random_ffn(150, 600), 8, list(range(1, 150, 2)) + list(range(0, 140, 2)), parts=3)


@pytest.mark.parametrize("gated", [True, False])
def test_masks_biases_and_activations(gated):
    """Bit 31 is the sign."""
    ffn = random_ffn(20, 70, "silu", gated, biased=True)
    masks = torch.randint(0, 2**32, (25,), generator=torch.Generator().manual_seed(1)).to(torch.int32).to(DEVICE)
    rows = [3, 19, 0, 7, 8, 12]
    hidden, _ = check(ffn, 32, rows, masks)
    wanted = (masks[:6] >> torch.arange(32, device=DEVICE)[:, None]) & 1
    assert torch.equal(hidden[:, :6] != 0, wanted == 1) and 0 < int(wanted[31].sum()) < 6


def test_both_relus():
    check(random_ffn(9, 64, "drelu", biased=True), 16, [1, 2, 8])


def test_a_row_is_that_of_the_way_for_one():
    """Of each of 16 alone, within rounding, and the same for 8 of them where the GPU multiplies."""
    ffn, x = random_ffn(12, 129), random_input(16, 129)
    hidden, parts = run(sparse_ffn, ffn, x, list(range(12)), scratch=scratch_for(ffn, 16))
    for t in (0, 15):
        alone = run(sparse_ffn, ffn, x[t : t + 1], list(range(12)))
        assert_close(hidden[t, :12], alone[0][0, :12], 2e-6)
        assert_close(parts.sum(0)[t], alone[1].sum(0)[0], 2e-6)
    fewer = run(sparse_ffn, ffn, x[8:], list(range(12)), scratch=scratch_for(ffn, 8))
    for found, expected in ((fewer[0][:, :12], hidden[8:, :12]), (fewer[1], parts[:, 8:])):
        if DEVICE == "cuda":
            assert torch.equal(found, expected)
        else:  # numpy's products depend on the shape
            assert_close(found, expected, 5e-7)


def test_what_is_taken_and_what_is_refused():
    assert takes_ffn("bf16", 8) and not takes_ffn("f16", 8) and not takes_ffn("bf16", 4)
    ffn = random_ffn(4, 64)
    with pytest.raises(ValueError, match=f"wants {ffn_floats(8, 9, 64, True)} f32 of scratch"):
        run(sparse_ffn, ffn, random_input(8, 64), [1], scratch=scratch_for(ffn, 8)[1:])
