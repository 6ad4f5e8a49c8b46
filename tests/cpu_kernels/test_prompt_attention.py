"""A prompt's attention against its reference and torch: heads, windows, norms, stored types; and that a token's answer
does not depend on the piece it came in, on the number of workers, or on where the blocks lie."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cpu_kernels.prompt_attention import PromptScratch, prompt_attention, prompt_attention_ref
from cpu_kernels.rope import QKNorm, rope
from cpu_kernels.worker_pool import WorkerPool

NONE, EPS = np.empty(0, np.float32), 1e-6
NO_NORM = QKNorm(NONE, NONE, EPS)
KINDS = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
SHAPES = [(1, 1, 10), (4, 4, 64), (6, 2, 80), (7, 1, 128), (3, 3, 17), (2, 1, 130)]


class Case(NamedTuple):
    """A text's projections and angles, and how its keys and values are kept."""

    qkv: np.ndarray
    rotation: tuple[np.ndarray, np.ndarray]
    norm: QKNorm
    cache: np.ndarray
    table: np.ndarray
    scales: np.ndarray | None
    heads: int

    @property
    def width(self):
        return self.heads * self.cache.shape[4]

    def emptied(self, in_order=False):
        """The same with nothing in its cache, whose blocks may lie in order."""
        cache, scales = (None if part is None else blank(part) for part in (self.cache, self.scales))
        table = np.arange(len(self.table), dtype=np.int32) if in_order else self.table
        return self._replace(cache=cache, scales=scales, table=table)


def blank(stored):
    """What must not be read, where the type knows such a number."""
    return np.full_like(stored, 99 if stored.dtype == np.int8 else np.nan)


def make(shape, tokens, kind="f32", rotated=True, norm=None, block_size=32, scale=1.0):
    heads, kv_heads, head_dim = shape
    rng = np.random.default_rng([*shape, tokens])
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    qkv[:, : heads * head_dim] *= scale
    angles = rng.uniform(-7, 7, (tokens, head_dim // 2 if rotated and head_dim % 2 == 0 else 0))
    count = -(-tokens // block_size)
    cache = blank(np.empty((count + 2, 2, kv_heads, block_size, head_dim), KINDS[kind]))
    scales = blank(np.empty(cache.shape[:4], np.float32)) if kind == "int8" else None
    rotation = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    table = rng.permutation(count + 2)[:count].astype(np.int32)
    return Case(qkv, rotation, norms(norm, shape), cache, table, scales, heads)


def norms(kind, shape):
    """`kind`: what it is of, each head or all of them, and whether it is LayerNorm."""
    if kind is None:
        return NO_NORM
    heads, kv_heads, head_dim = shape
    sizes = (head_dim, head_dim) if kind.startswith("each") else (heads * head_dim, kv_heads * head_dim)
    rng = np.random.default_rng(1)
    weights, biases = ([rng.standard_normal(size).astype(np.float32) for size in sizes] for _ in range(2))
    return QKNorm(*weights, EPS, *biases) if kind.endswith("layer") else QKNorm(*weights, EPS)


def run(case, window=None, pieces=None, threads=1):
    """Answers [t, heads * head_dim], piece after piece."""
    tokens, pool, scratch = len(case.qkv), WorkerPool(threads), PromptScratch(threads)
    out = np.full((tokens, case.width), np.nan, np.float32)
    for start, end in pieces or [(0, tokens)]:
        qkv, rotation = case.qkv[start:end].copy(), tuple(angle[start:end] for angle in case.rotation)
        places = case.cache, case.table, start, window
        prompt_attention(qkv, rotation, case.norm, *places, out[start:end], pool, scratch, case.scales)
    pool.close()
    return out


def expected(case, window=None):
    case, out = case.emptied(), np.empty((len(case.qkv), case.width), np.float32)
    prompt_attention_ref(case.qkv.copy(), case.rotation, case.norm, case.cache, case.table, 0, window, out, case.scales)
    return out


def assert_matches(case, window=None, pieces=None, bound=1.0):
    # A code of int8 that comes out beside the reference's, as f32 rounds, is a step of 1 / 127 of a head's largest.
    tolerance = bound * (2e-3 if case.scales is not None else 4e-4 if case.cache.dtype == np.float16 else 2e-5)
    np.testing.assert_allclose(run(case, window, pieces), expected(case, window), rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(shape, kind):
    for tokens, pieces in ((1, None), (70, None), (300, [(0, 1), (1, 131), (131, 300)])):
        assert_matches(make(shape, tokens, kind), None, pieces)


@pytest.mark.parametrize("norm", ["each", "all", "each layer", "all layer"])
def test_norms_match_reference(norm):
    for rotated in (True, False):
        assert_matches(make((6, 2, 64), 40, rotated=rotated, norm=norm))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 128, 129, 299, 1000])
def test_windows_match_reference(window):
    assert_matches(make((6, 2, 64), 300), window, [(0, 50), (50, 300)])


@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_block_sizes(block_size):
    assert_matches(make((4, 2, 16), 150, "f16", block_size=block_size), pieces=[(0, 5), (5, 150)])


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_flat_and_steep_scores(scale):
    """Up to scores whose exponentials underflow."""
    # A score of thousands is known to 1e-7 of itself, and its error becomes the relative error of its weight.
    assert_matches(make((4, 4, 64), 150, rotated=False, scale=scale), bound=5 + scale / 100)


@pytest.mark.parametrize(("window", "heads", "kv_heads"), [(None, 4, 4), (None, 6, 2), (100, 6, 2)])
def test_is_torchs_attention(window, heads, kv_heads):
    tokens, head_dim = 200, 48
    case = make((heads, kv_heads, head_dim), tokens, rotated=False)
    parts = torch.from_numpy(case.qkv).double().view(tokens, -1, head_dim).transpose(0, 1)
    q, k, v = parts.split([heads, kv_heads, kv_heads])
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = (behind >= 0) & (behind < (window or tokens))
    truth = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
    np.testing.assert_allclose(run(case, window), truth.transpose(0, 1).flatten(1), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 90])
def test_same_bits_in_any_pieces_with_any_threads_wherever_blocks_lie(kind, window):
    case = make((6, 2, 64), 330, kind, norm="each")
    truth = run(case, window)
    assert np.isfinite(truth).all()
    for lengths, threads in (([330], 3), ([1, 6, 120, 3, 200], 2), ([128, 128, 74], 1), ([13] * 25 + [5], 7)):
        ends = np.cumsum([0, *lengths])
        found = run(case.emptied(in_order=threads == 2), window, list(pairwise(ends)), threads)
        assert (found == truth).all()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_have_the_bits_that_decode_writes(kind):
    case = make((6, 2, 64), 45, kind, norm="each")
    ours, decoded = case.emptied(), case.emptied()
    run(ours, threads=2)
    pool = WorkerPool(1)
    for position, row in enumerate(case.qkv.copy()):
        turn = tuple(angle[position] for angle in case.rotation)
        rope(row.reshape(-1, 64), turn, case.norm, decoded.cache, case.table, position, pool, decoded.scales)
    np.testing.assert_array_equal(ours.cache, decoded.cache)
    if kind == "int8":
        np.testing.assert_array_equal(ours.scales, decoded.scales)


def test_a_broken_value_shows_from_its_token_on():
    case = make((2, 1, 16), 150)
    case.qkv[100, 2 * 16 + 3] = np.nan  # of its key
    found = np.isnan(run(case)).all(1)
    assert found[100:].all() and not found[:96].any()


def test_buffers_grow_and_keep_nothing_of_other_calls():
    pool, scratch = WorkerPool(1), PromptScratch(1)
    for shape in ((2, 1, 16), (2, 2, 130), (3, 1, 8)):
        case = make(shape, 40)
        truth, out = run(case), np.empty((40, case.width), np.float32)
        case = case.emptied()
        prompt_attention(case.qkv, case.rotation, case.norm, case.cache, case.table, 0, None, out, pool, scratch)
        assert (out == truth).all()


def test_no_tokens():
    assert run(make((2, 1, 16), 0)).shape == (0, 32)


def test_what_does_not_fit_is_refused():
    case, pool, scratch = make((4, 2, 10), 50), WorkerPool(1), PromptScratch(1)
    out = np.empty((50, 40), np.float32)
    rotation, cache, weights = case.rotation, case.cache, np.ones(10, np.float32)

    def refused(
        said, qkv=case.qkv, rotation=rotation, norm=NO_NORM, cache=cache, table=case.table, start=0, window=None
    ):
        with pytest.raises(ValueError, match=said):
            prompt_attention(qkv, rotation, norm, cache, table, start, window, out, pool, scratch)

    refused("shapes do not fit", qkv=case.qkv[:, 10:].copy())
    refused("shapes do not fit", qkv=case.qkv[:49])
    refused("shapes do not fit", rotation=(rotation[0], rotation[1][:, :4].copy()))
    refused("shapes do not fit", norm=QKNorm(weights, NONE, EPS))
    refused("shapes do not fit", norm=QKNorm(weights, weights, EPS, NONE, weights))
    refused("shapes do not fit", cache=cache[0])
    refused("wants f32 arrays", qkv=case.qkv.astype(np.float64))
    refused("C-contiguous", qkv=np.asfortranarray(case.qkv))
    refused("int32 block table", table=case.table.astype(np.int64))
    refused("at most 64 positions", start=15)
    refused("at most 64 positions", start=-1)
    refused("a window of at least 1", window=0)
    refused("leave the cache of 4 blocks", table=case.table + np.int32(4))
    refused("beside an int8 cache alone", cache=np.zeros(cache.shape, np.int8))
