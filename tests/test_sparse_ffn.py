"""The sparse FFN kernel against its reference: shapes, types, activations, and which neurons are active."""

import numpy as np
import pytest
import torch

from cpu_kernels.activations import ACTIVATION_CODES, activate_ref
from cpu_kernels.sparse_ffn import FFNView, SparseFFNScratch, sparse_ffn, sparse_ffn_ref
from cpu_kernels.worker_pool import WorkerPool


def make(f, d, dtype=torch.float32, gated=True, biased=False, activation="relu"):
    g = torch.Generator().manual_seed(f * 31 + d)

    def random(*shape):
        return (torch.randn(*shape, generator=g) * d**-0.5).to(dtype)

    biases = (random(f) if gated else None, random(f)) if biased else (None, None)
    return FFNView.of(random(f, d) if gated else None, random(f, d), random(f, d), *biases, activation)


def active(kind, f, tokens):
    """Row lists of each token: none, all, one, or every third."""
    rows = {"none": np.arange(0), "all": np.arange(f), "one": np.array([f - 1]), "third": np.arange(0, f, 3)}[kind]
    lists = [np.roll(rows, t)[: len(rows) - t % 2] if kind == "third" else rows for t in range(tokens)]
    return np.concatenate(lists).astype(np.int32), np.cumsum([0, *map(len, lists)]).astype(np.int64)


def run(view, x, rows, offsets, threads=1, skip=True):
    out, pool = np.ones_like(x), WorkerPool(threads)
    fired = sparse_ffn(view, x, rows, offsets, out, SparseFFNScratch(x.shape[1], len(view.up), threads), pool, skip)
    pool.close()
    return out, fired


def inputs(tokens, d):
    return np.random.default_rng(tokens * d).standard_normal((tokens, d)).astype(np.float32)


def check(view, tokens, kind, skip=True):
    x = inputs(tokens, view.up.shape[1])
    rows, offsets = active(kind, len(view.up), tokens)
    ours, fired = run(view, x, rows, offsets, skip=skip)
    truth = np.ones_like(x)
    assert fired == sparse_ffn_ref(view, x, rows, offsets, truth)
    np.testing.assert_allclose(ours, truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("f", "d"), [(1, 1), (65, 17), (300, 384), (129, 1023)])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["none", "all", "one", "third"])
def test_matches_reference(f, d, dtype, tokens, kind):
    check(make(f, d, dtype), tokens, kind)


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_every_activation_gated_and_not(activation, gated, biased, skip):
    check(make(70, 33, torch.float32, gated, biased, activation), 2, "third", skip)


@pytest.mark.parametrize("skip", [True, False])
def test_same_bits_for_any_threads_and_alone_or_among_others(skip):
    view = make(3000, 512, torch.bfloat16)
    x = inputs(3, 512)
    rows, offsets = active("third", 3000, 3)
    together, fired = run(view, x, rows, offsets, 1, skip)
    for threads in (2, 3, 7):
        assert (run(view, x, rows, offsets, threads, skip)[0] == together).all()
        alone = [
            run(
                view,
                x[t : t + 1],
                rows[offsets[t] : offsets[t + 1]],
                np.array([0, offsets[t + 1] - offsets[t]]),
                threads,
                skip,
            )
            for t in range(3)
        ]
        assert (np.concatenate([out for out, _ in alone]) == together).all()
        assert sum(count for _, count in alone) == fired


def test_skipping_zeros_changes_no_bit():
    view = make(500, 64)
    rows, offsets = active("all", 500, 1)
    x = inputs(1, 64)
    assert (run(view, x, rows, offsets, skip=True)[0] == run(view, x, rows, offsets, skip=False)[0]).all()


def test_skipped_neurons_are_not_read():
    """A neuron whose gate is 0 may hold anything in its other rows."""
    view = make(40, 16)
    x = np.abs(inputs(1, 16))
    view.gate[::2] = -1
    view.up[::2] = view.down[::2] = np.nan
    out, fired = run(view, x, *active("all", 40, 1))
    assert np.isfinite(out).all() and fired <= 20


def test_misfits_are_refused():
    view = make(4, 8)
    rows, offsets = active("all", 4, 1)
    with pytest.raises(ValueError, match="shapes do not fit"):
        run(view, inputs(1, 9), rows, offsets)
    with pytest.raises(ValueError, match="int32 rows"):
        run(view, inputs(1, 8), rows.astype(np.int64), offsets)
    with pytest.raises(ValueError, match="unknown activation"):
        FFNView.of(None, torch.zeros(2, 2), torch.zeros(2, 2), None, None, "tanh")
    with pytest.raises(ValueError, match="down has shape"):
        FFNView.of(None, torch.zeros(2, 3), torch.zeros(3, 2), None, None, "relu")


def test_relu2_reference_is_the_square():
    z = torch.tensor([-2.0, 0.0, 3.0])
    assert activate_ref("relu2", z).tolist() == [0.0, 0.0, 9.0]
