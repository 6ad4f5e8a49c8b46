"""The sparse FFN kernel against its reference: shapes, types, activations, batches, and which neurons are active."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from matrix_cases import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    THREADS,
    in_f64,
    product_bound,
    random_input,
    random_matrix,
    stored,
)

from cpu_kernels.activations import activate_ref
from cpu_kernels.contract import padded
from cpu_kernels.matrix import Matrix
from cpu_kernels.sparse_ffn import FFNView, SparseFFNScratch, sparse_ffn, sparse_ffn_ref
from cpu_kernels.worker_pool import WorkerPool


def make(f, d, dtype="f32", gated=True, biased=False, activation="relu"):
    gate, up, down = (random_matrix(f, d, dtype, seed, d**-0.5) for seed in range(3))
    biases = [torch.from_numpy(random_input(1, f, seed)[0]) if biased else None for seed in range(2)]
    return FFNView.of(gate if gated else None, up, down, biases[0] if gated else None, biases[1], activation)


def active(kind, f, tokens):
    """Row lists of each token: none, all, one, or every third, shifted from token to token."""
    rows = {"none": np.arange(0), "all": np.arange(f), "one": np.array([f - 1]), "third": np.arange(0, f, 3)}[kind]
    lists = [np.sort((rows + t) % f)[: len(rows) - t % 2] if kind == "third" else rows for t in range(tokens)]
    return np.concatenate(lists).astype(np.int32), np.cumsum([0, *map(len, lists)]).astype(np.int64)


def run(view, x, rows, offsets, threads=1, skip=True):
    out, pool = np.ones_like(x), WorkerPool(threads)
    # Larger than needed: kernels are compiled again for another number of buffers, and where a view is all of one.
    scratch = SparseFFNScratch(x.shape[1], view.up.shape[0] + 1, max(THREADS))
    fired = sparse_ffn(view, x, rows, offsets, out, scratch, pool, skip)
    pool.close()
    return out, fired


def in_f32(view):
    """The same weights in f32."""
    gate, up, down = (None if part is None else Matrix.of(part.widen()) for part in (view.gate, view.up, view.down))
    return replace(view, gate=gate, up=up, down=down)


def check(view, tokens, kind, skip=True):
    x = random_input(tokens, view.up.columns)
    rows, offsets = active(kind, view.up.shape[0], tokens)
    ours, fired = run(view, x, rows, offsets, skip=skip)
    truth = np.ones_like(x)
    assert fired == sparse_ffn_ref(in_f32(view), x, rows, offsets, truth)
    return np.abs(ours - truth), x, rows, offsets


def relu_bound(view, x, rows, offsets):
    """The largest error of a gated ReLU FFN: what the errors of its products make of it, and 1e-6 of its sums."""
    gate, up, down = map(in_f64, (view.gate, view.up, view.down))
    z, u = x @ gate.T, x @ up.T
    z_error, u_error = product_bound(view.gate, x), product_bound(view.up, x)
    error = z_error * np.abs(u) + (np.maximum(z, 0) + z_error) * u_error + 1e-6 * np.abs(np.maximum(z, 0) * u)
    mine = np.zeros_like(z)
    for t in range(len(x)):
        mine[t, rows[offsets[t] : offsets[t + 1]]] = 1
    # int4 codes are summed with their offset of 8, whose share is then taken off.
    offset = 2 * np.abs(down).max(-1, initial=0, keepdims=True) * (view.down.dtype == "int4")
    return (mine * error) @ np.abs(down) + 1e-6 * (mine * np.abs(z * u)) @ (np.abs(down) + offset) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("f", "d"), SHAPES)
def test_one_token_and_the_union_of_a_few_match_the_reference(f, d, dtype):
    view = make(f, d, dtype)
    for kind, tokens in product(("none", "all", "one", "third"), (1, 2, 5, 7)):
        error, *inputs = check(view, tokens, kind)
        assert (error <= relu_bound(view, *inputs)).all(), f"{kind} of the rows, {tokens} tokens"


def test_a_full_batch_matches_the_reference():
    error, *inputs = check(make(65, 17), 8, "third")
    assert (error <= relu_bound(make(65, 17), *inputs)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("f", "d"), [(3, 17), (300, 384)])
def test_many_tokens_match_the_reference(f, d, dtype):
    for kind in ("none", "all", "third"):
        error, *inputs = check(make(f, d, dtype), 11, kind)
        assert (error <= relu_bound(make(f, d, dtype), *inputs)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_every_activation_gated_and_not(activation, gated, biased, skip):
    for tokens in (1, 3, 9):
        error, *_ = check(make(70, 33, "f32", gated, biased, activation), tokens, "third", skip)
        assert error.max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_alone_or_among_others(dtype, monkeypatch):
    """Among others where the rows of down are one part."""
    monkeypatch.setattr("cpu_kernels.worker_pool.BYTES_PER_WORKER", 1)
    view, x = make(500, 333, dtype), random_input(11, 333)
    rows, offsets = active("third", 500, 11)
    alone = [
        run(view, x[t : t + 1], rows[offsets[t] : offsets[t + 1]], np.array([0, offsets[t + 1] - offsets[t]]))
        for t in range(11)
    ]
    for tokens in (1, 3, 7, 11):
        for threads in THREADS:
            out, fired = run(view, x[:tokens], rows[: offsets[tokens]], offsets[: tokens + 1], threads)
            assert (out == np.concatenate([each for each, _ in alone[:tokens]])).all()
            assert fired == sum(count for _, count in alone[:tokens])


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipping_zeros_changes_no_bit(dtype):
    view = make(500, 65, dtype)
    for tokens in (1, 3):
        x, (rows, offsets) = random_input(tokens, 65), active("all", 500, tokens)
        assert (run(view, x, rows, offsets, skip=True)[0] == run(view, x, rows, offsets, skip=False)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_several_parts_match_the_reference(dtype, monkeypatch):
    """8 parts of down, half of whose rows add nothing, some without any: the same bits for any number of workers, and
    whether those that add nothing are skipped."""
    monkeypatch.setattr("cpu_kernels.worker_pool.BYTES_PER_WORKER", 1)
    view, x = make(9000, 65, dtype), random_input(3, 65)
    for tokens, step in ((1, 1), (1, 7), (1, 60), (1, 200), (3, 7)):
        each = np.arange(0, 9000, step, dtype=np.int32)
        rows, offsets = np.tile(each, tokens), np.arange(tokens + 1) * len(each)
        ours, fired = run(view, x[:tokens], rows, offsets)
        truth = np.ones_like(ours)
        assert fired == sparse_ffn_ref(in_f32(view), x[:tokens], rows, offsets, truth)
        assert (np.abs(ours - truth) <= relu_bound(view, x[:tokens], rows, offsets)).all()
        for threads in THREADS:
            for skip in (True, False):
                assert (run(view, x[:tokens], rows, offsets, threads, skip)[0] == ours).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_tokens_rows_in_the_parts_change_no_bit(dtype):
    view, x = make(9000, 65, dtype), random_input(4, 65)
    own = [np.arange(first, 9000, step, dtype=np.int32) for first, step in ((0, 7), (3, 5), (1, 900), (8999, 1))]
    alone = [run(view, x[t : t + 1], rows, np.array([0, len(rows)]))[0] for t, rows in enumerate(own)]
    offsets = np.cumsum([0, *(len(rows) for rows in own)])
    assert (run(view, x, np.concatenate(own), offsets)[0] == np.concatenate(alone)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_neurons_are_not_read(dtype):
    """A neuron whose gate is 0, or which no token names, may hold anything in its other rows."""
    gate = torch.rand(40, 16, generator=torch.Generator().manual_seed(0))
    gate[::2] = -1
    parts = [stored(gate, dtype), *(random_matrix(40, 16, dtype, seed) for seed in (1, 2))]
    clean = FFNView.of(*parts, None, None, "relu")
    spoilt = FFNView.of(parts[0], *(spoil(part, slice(0, None, 2)) for part in parts[1:]), None, None, "relu")
    for tokens in (1, 2, 9):
        x = np.abs(random_input(tokens, 16))
        out, fired = run(spoilt, x, *active("all", 40, tokens))
        assert np.isfinite(out).all() and fired == 20 * tokens
        assert (out == run(clean, x, *active("all", 40, tokens))[0]).all()
        odd = np.tile(np.arange(1, 40, 2, dtype=np.int32), tokens)
        every = [spoil(part, slice(0, None, 2)) for part in parts]
        named = run(FFNView.of(*every, None, None, "relu"), x, odd, np.arange(tokens + 1) * 20)
        assert (named[0] == out).all()


def spoil(matrix, rows):
    """The matrix with NaN in some of its rows: as weights, or as the scales of blocks."""
    stored_rows = matrix.rows.copy()
    if matrix.dtype in ("int8", "int4"):
        scales = stored_rows.view(np.uint8)[rows, -(padded(matrix.columns) // 16) :]
        scales[:] = 0xFF  # f16 0xFFFF is NaN
        stored_rows.view(np.uint8)[rows, -(padded(matrix.columns) // 16) :] = scales
    else:
        stored_rows[rows] = {"f32": np.nan, "bf16": 0x7FC0, "f16": 0x7E00}[matrix.dtype]
    return Matrix(stored_rows, matrix.columns)


def test_misfits_are_refused():
    view = make(4, 8)
    rows, offsets = active("all", 4, 1)
    with pytest.raises(ValueError, match="shapes do not fit"):
        run(view, random_input(1, 9), rows, offsets)
    with pytest.raises(ValueError, match="shapes do not fit"):
        run(view, random_input(2, 8), rows, offsets)
    with pytest.raises(ValueError, match="int32 rows"):
        run(view, random_input(1, 8), rows.astype(np.int64), offsets)
    up, flat = random_matrix(2, 3, "f32"), random_matrix(3, 2, "f32")
    with pytest.raises(ValueError, match="unknown activation"):
        FFNView.of(None, up, up, None, None, "tanh")
    with pytest.raises(ValueError, match="down has shape"):
        FFNView.of(None, up, flat, None, None, "relu")
    with pytest.raises(ValueError, match=r"gate has shape .* of bf16, up is .* of f32"):
        FFNView.of(random_matrix(2, 3, "bf16"), up, up, None, None, "relu")
    with pytest.raises(ValueError, match="up_bias has shape"):
        FFNView.of(None, up, up, None, torch.zeros(3), "relu")


def test_relu2_reference_is_the_square():
    z = torch.tensor([-2.0, 0.0, 3.0])
    assert activate_ref("relu2", z).tolist() == [0.0, 0.0, 9.0]
