"""The FFN of many tokens against its reference: types, activations, biases, parts of the neurons, and who fires."""

import numpy as np
import pytest
import torch
from matrix_cases import ACTIVATIONS, DTYPES, random_input, random_matrix

from cpu_kernels.contract import PRECISIONS
from cpu_kernels.dense_ffn import dense_ffn, dense_ffn_ref
from cpu_kernels.gemm import GemmScratch
from cpu_kernels.sparse_ffn import FFNView
from cpu_kernels.worker_pool import WorkerPool

SIZES = [(1, 1), (40, 17), (300, 384), (129, 129)]


def make(f, d, dtype="f32", gated=True, biased=True, activation="relu"):
    gate, up, down = (random_matrix(f, d, dtype, seed, d**-0.5) for seed in range(3))
    biases = [torch.from_numpy(random_input(1, f, seed)[0]) if biased else None for seed in range(2)]
    return FFNView.of(gate if gated else None, up, down, biases[0] if gated else None, biases[1], activation)


def run(view, x, first=0, stop=None, threads=1, precision="precise"):
    out, pool = np.full_like(x, np.nan), WorkerPool(threads)
    fired = np.zeros((len(x), view.up.shape[0]), np.bool_)
    dense_ffn(view, x, out, pool, GemmScratch(threads, precision), first, stop, fired)
    pool.close()
    assert not fired[:, :first].any() and (stop is None or not fired[:, stop:].any())
    return out, fired[:, first:stop]


def check(view, tokens, first=0, stop=None, precision="precise"):
    x, limit = random_input(tokens, view.up.columns), 1e-6 if precision == "precise" else 1e-3
    (found, fired), truth = run(view, x, first, stop, precision=precision), np.zeros_like(x)
    expected = dense_ffn_ref(view, x, truth, first, stop)
    assert np.linalg.norm(found - truth) <= limit * np.linalg.norm(truth)
    assert np.mean(fired != expected) < (
        1e-3 if precision == "precise" else 3e-3
    )  # one that hardly fires may round to 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("f", "d"), SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matches_reference(precision, f, d, dtype):
    for tokens in (1, 7, 40):
        check(make(f, d, dtype), tokens, precision=precision)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation, gated):
    if gated or activation != "drelu":  # which is one of both
        check(make(300, 64, gated=gated, activation=activation), 13)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
@pytest.mark.parametrize("first", [5, 128, 299, 300])
def test_neurons_from_one_on(dtype, first):
    view, x = make(300, 128, dtype, biased=False), random_input(9, 128)
    if first == 300:
        assert (run(view, x, first)[0] == 0).all()
    else:
        check(view, 9, first)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
@pytest.mark.parametrize(("first", "stop"), [(0, 1), (5, 133), (130, 299), (7, 7)])
def test_neurons_between_two(dtype, first, stop):
    view = make(300, 128, dtype)
    if first == stop:
        assert (run(view, random_input(9, 128), first, stop)[0] == 0).all()
    else:
        check(view, 9, first, stop)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_for_any_threads_and_alone_or_among_others(precision, dtype):
    view, x = make(300, 200, dtype), random_input(20, 200)
    truth, fired = run(view, x, precision=precision)
    for threads in (3, 9):  # which take units of 32 or 64
        found = run(view, x, threads=threads, precision=precision)
        assert (found[0] == truth).all() and (found[1] == fired).all()
    for some in (slice(0, 1), slice(5, 9)):
        found = run(view, x[some], precision=precision)
        assert (found[0] == truth[some]).all() and (found[1] == fired[some]).all()


def test_what_does_not_fit_is_refused():
    view, x, pool, scratch = make(9, 8), random_input(2, 8), WorkerPool(1), GemmScratch(1)
    for given, said in (
        ((x[:, :7], x), "do not fit"),
        ((x, x[:1]), "do not fit"),
        ((x, x.astype(np.float64)), "contiguous f32"),
        ((x, x.copy(), pool, scratch, 10), "do not fit"),
        ((x, x.copy(), pool, scratch, 5, 4), "do not fit"),
        ((x, x.copy(), pool, scratch, 0, 10), "do not fit"),
        ((x, x.copy(), pool, scratch, 0, None, np.zeros((2, 8), np.bool_)), "fired is bool"),
    ):
        with pytest.raises(ValueError, match=said):
            dense_ffn(view, *(given if len(given) > 2 else (*given, pool, scratch)))
