"""The FFN of many tokens, every neuron of it, by the tiles of `gemm.py`: what prompts, profiling and evaluation take.

Threads: workers meet once the tokens are in form and once the neurons are computed. Before that each takes units of
neurons, whose gate, up and activation stay in its own cache, after it units of columns of the answer.
"""

from __future__ import annotations

import numpy as np
import torch

from cpu_kernels import barrier
from cpu_kernels.activations import activate, activate_ref, activate_up, activate_up_ref
from cpu_kernels.compiled import kernel, subroutine
from cpu_kernels.contract import GROUP, activation_word, split_activation
from cpu_kernels.gemm import LEAST, GemmScratch, products, row_sums, shares_of, some_tokens, tile_tokens
from cpu_kernels.matrix import Matrix
from cpu_kernels.panels import MOST, pack_columns, pack_tokens
from cpu_kernels.row_types import in_blocks
from cpu_kernels.sparse_ffn import FFNView
from cpu_kernels.worker_pool import WorkerPool


@subroutine
def _put_hidden(  # type: ignore[no-untyped-def]
    form, word, own, gated, gate_bias, up_bias, first, start, count, some, tokens, hidden, fired
):  # fmt: skip
    """The activations of a unit, neurons [first + start, + count), from gate and up in the worker's results."""
    neuron, zero = first + start, np.float32(0)
    for t in range(some[0], some[1]):
        gates, ups = own.results[0, t], own.results[1, t]
        for j in range(count):
            up = ups[j] + (up_bias[neuron + j] if up_bias.shape[0] else zero)
            if gated:
                value = activate(word, gates[j] + (gate_bias[neuron + j] if gate_bias.shape[0] else zero))
                up = activate_up(word, up)
                fires = value != 0 and (word != 6 or up != 0)
                value *= up
            else:
                value = activate(word, up)
                fires = value != 0
            ups[j] = value
            if fired.shape[0]:
                fired[t, neuron + j] = fires
        pack_columns(form, MOST, ups, count, start, t, tokens, own.codes, hidden)


@kernel
def _dense_ffn(  # type: ignore[no-untyped-def]
    worker, workers, state, form, word, like, gate, up, down, row_bytes, first, gate_bias, up_bias, neurons, x, packed, 
    hidden, own, out, fired,
):  # fmt: skip
    tokens, d = x.shape
    pack_tokens(state, form, like, x, own, packed)
    if not barrier.wait(state, workers):
        return
    unit, parts = shares_of(neurons, tokens, tile_tokens(form), workers, LEAST)
    piece = barrier.take(state)
    while piece // parts * unit < neurons:
        start, some = piece // parts * unit, some_tokens(form, piece % parts, parts, tokens)
        count = min(unit, neurons - start)
        if gate:
            products(form, like, gate, row_bytes, first + start, count, d, packed, some, tokens, own, 0)
        products(form, like, up, row_bytes, first + start, count, d, packed, some, tokens, own, 1)
        _put_hidden(form, word, own, gate != 0, gate_bias, up_bias, first, start, count, some, tokens, hidden, fired)
        piece = barrier.take(state)
    if not barrier.wait(state, workers):
        return
    unit, parts = shares_of(d, tokens, tile_tokens(form), workers, GROUP if in_blocks(like) else LEAST)
    piece = barrier.take(state)
    while piece // parts * unit < d:
        column, some = piece // parts * unit, some_tokens(form, piece % parts, parts, tokens)
        count = min(unit, d - column)
        rows = down + first * row_bytes
        row_sums(form, like, rows, row_bytes, neurons, d, column, count, hidden, some, tokens, own, 0)
        for t in range(some[0], some[1]):
            for j in range(count):
                out[t, column + j] = own.results[0, t, j]
        piece = barrier.take(state)


def dense_ffn(
    ffn: FFNView,
    x: np.ndarray,
    out: np.ndarray,
    pool: WorkerPool,
    scratch: GemmScratch,
    first: int = 0,
    stop: int | None = None,
    fired: np.ndarray | None = None,
) -> None:
    """out[t] = the neurons [first, stop), by default the last ones, for x[t], without the bias of down; both f32
    [t, d], C-contiguous.

    fired: bool [t, f], of which those neurons tell afterwards whether their activation is not 0.
    Raises `ValueError` when shapes or types do not fit.
    """
    w = ffn.weights
    d, neurons = w.d, ffn.up.shape[0]
    stop = neurons if stop is None else stop
    if x.ndim != 2 or x.shape[1] != d or out.shape != x.shape or not 0 <= first <= stop <= neurons:
        some = f"{neurons} x {d}, {first} to {stop}"
        raise ValueError(f"dense_ffn shapes do not fit: {some}, x {x.shape}, out {out.shape}")
    if {x.dtype, out.dtype} != {np.dtype(np.float32)} or not (x.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError(f"dense_ffn wants contiguous f32 x and out, got {x.dtype}, {out.dtype}")
    if fired is None:
        fired = np.empty((0, 0), np.bool_)
    elif fired.shape != (len(x), neurons) or fired.dtype != np.bool_:
        raise ValueError(f"fired is bool {(len(x), neurons)}, got {fired.dtype} {fired.shape}")
    if not len(x):
        return
    tokens, computed = len(x), stop - first
    rows = w.like, w.gate, w.up, w.down, w.width
    layer = activation_word(ffn.activation), *rows, first, w.gate_bias, w.up_bias, computed
    hidden = scratch.packed("hidden", tokens, computed)
    buffers = scratch.packed("x", tokens, d), hidden, scratch.owns(tokens)
    pool.run(_dense_ffn, pool.threads, pool.barrier, scratch.form, *layer, x, *buffers, out, fired)


def dense_ffn_ref(ffn: FFNView, x: np.ndarray, out: np.ndarray, first: int = 0, stop: int | None = None) -> np.ndarray:
    """`dense_ffn` in torch, in f64; returns which neurons' activations are not 0, bool [t, stop - first]."""
    tokens, rows = torch.from_numpy(x).double(), slice(first, stop)

    def project(weight: Matrix, bias: np.ndarray) -> torch.Tensor:
        z = tokens @ weight.widen(rows).double().T
        return z + torch.from_numpy(bias[rows]) if bias.size else z

    decides = (ffn.up, ffn.up_bias) if ffn.gate is None else (ffn.gate, ffn.gate_bias)
    hidden = activate_ref(ffn.activation, project(*decides))
    fired = hidden != 0
    if ffn.gate is not None:
        up = activate_up_ref(ffn.activation, project(ffn.up, ffn.up_bias))
        fired &= (up != 0) | (split_activation(ffn.activation)[0] != "drelu")
        hidden = hidden * up
    out[:] = (hidden @ ffn.down.widen(rows).double()).float().numpy()
    return fired.numpy()
