"""The kernel of proxies against its reference: gated and not, each kind of block, tokens and workers."""

import numpy as np
import pytest
import torch
from matrix_cases import THREADS

from cpu_kernels.matrix import Matrix
from cpu_kernels.proxy import ProxyView, passing_of_tokens, scores_ref
from cpu_kernels.worker_pool import WorkerPool


def make(d, f, activation="silu", gated=True, bias=False, kind="int4", tokens=3):
    g = torch.Generator().manual_seed(d + f)
    gate, up = (Matrix.of(torch.randn(f, d, generator=g) / d**0.5, kind) for _ in range(2))
    lengths = torch.rand(f, generator=g).numpy() + np.float32(0.1)
    biases = [torch.randn(f, generator=g).numpy() if bias else None for _ in range(2)]
    if not gated:
        gate, biases[0] = None, None
    view = ProxyView(gate, up, lengths, np.float32(0), activation, *biases)
    return view, torch.randn(tokens, d, generator=g).numpy()


def threshold_between(scores, share):
    """In the middle of the widest gap among some scores around the quantile `share`, so that rounding moves none."""
    ordered = np.sort(scores.ravel())
    at = int(share * (len(ordered) - 1))
    near = ordered[max(0, at - 20) : at + 21]
    widest = int(np.diff(near).argmax()) if len(near) > 1 else 0
    return np.float32(near[widest : widest + 2].mean())


def at_threshold(view, threshold):
    return ProxyView(view.gate, view.up, view.lengths, threshold, view.activation, view.gate_bias, view.up_bias)


@pytest.mark.parametrize(("d", "f"), [(1, 1), (17, 65), (384, 301)])
@pytest.mark.parametrize(
    ("activation", "gated", "bias", "kind"),
    [("silu", True, False, "int4"), ("gelu", True, True, "int8"), ("gelu_tanh", False, True, "int4")],
)
def test_names_what_the_reference_names(d, f, activation, gated, bias, kind):
    view, x = make(d, f, activation, gated, bias, kind)
    scores, pool = scores_ref(view, x), WorkerPool(1)
    for threshold in (np.float32(0), threshold_between(scores, 0.6), np.float32(1e9)):
        ids, offsets = passing_of_tokens(at_threshold(view, threshold), x, pool)
        assert ids.dtype == np.int32 and offsets.tolist() == [0, *(scores >= threshold).sum(1).cumsum()]
        for t, row in enumerate(scores):
            assert ids[offsets[t] : offsets[t + 1]].tolist() == np.flatnonzero(row >= threshold).tolist()


def test_same_neurons_for_any_number_of_workers():
    view, x = make(130, 301, tokens=5)
    view = at_threshold(view, threshold_between(scores_ref(view, x), 0.5))
    found = []
    for threads in THREADS:
        pool = WorkerPool(threads)
        found.append([part.tolist() for part in passing_of_tokens(view, x, pool)])
        pool.close()
    assert found == found[:1] * len(THREADS) and 0 < len(found[0][0]) < 5 * 301


def test_bytes_that_naming_reads():
    view, _ = make(17, 65)
    assert view.nbytes == 65 * (2 * (64 + 8) + 4)


def test_misfits_are_refused():
    view, x = make(5, 3)
    with pytest.raises(ValueError, match="wants f32 x of 5 columns"):
        passing_of_tokens(view, x.astype(np.float64), WorkerPool(1))
    with pytest.raises(ValueError, match="lengths is float32"):
        ProxyView(view.gate, view.up, view.lengths[:2], np.float32(0), "silu")
    with pytest.raises(ValueError, match="rows are in blocks, got f32"):
        ProxyView(None, Matrix.of(torch.zeros(3, 5)), view.lengths, np.float32(0), "silu")
    with pytest.raises(ValueError, match="gate is int4"):
        ProxyView(Matrix.of(torch.zeros(2, 5), "int4"), view.up, view.lengths, np.float32(0), "silu")
