"""The compiled decode step over keys and values in int8: torch on the same stored values, others' rows, prefixes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from step_cases import relative_error, some_tokens, tiny_model

from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, KVPool, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.cpu_step import CpuStep

pytest.importorskip("transformers")
CAPACITY, BLOCK = 24, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama-relu", tmp_path_factory.mktemp("models"))


class Case:
    """A model's step over a pool of int8 blocks that sequences share."""

    def __init__(self, folder):
        opened = ModelFolder.open(folder).with_kv("int8")
        self.spec = opened.spec
        runtime = FFNRuntime("exact", WorkerPool(2), self.spec.d_model, self.spec.d_ff)
        self.model = opened.build(runtime, None, None)
        self.pool = KVPool(self.spec, 30 * BLOCK, BLOCK)
        self.step = CpuStep(self.model, self.sequence(), runtime)

    def sequence(self):
        return KVCache(self.spec, CAPACITY, self.pool)

    def run(self, tokens, cache):
        """Logits [t, vocab] of one sequence, token after token."""
        return torch.cat([self.step.rows([Row(cache, token)], "exact").clone() for token in tokens])

    def stored(self, cache, tokens):
        """Codes and scales of the first tokens [n_layers, 2, n_kv_heads, tokens, ...]."""
        table = cache.table[: -(-tokens // BLOCK)]
        codes = self.pool.data[:, table].transpose(0, 2, 3, 1, 4, 5)
        scales = self.pool.scales[:, table].transpose(0, 2, 3, 1, 4)
        shape = codes.shape[:3]
        return codes.reshape(*shape, -1, codes.shape[-1])[..., :tokens, :], scales.reshape(*shape, -1)[..., :tokens]


def test_is_torch_on_the_same_stored_values(folder):
    case, text = Case(folder), some_tokens(19)
    assert case.pool.data.dtype == np.int8
    of_torch, of_step = case.sequence(), case.sequence()
    case.model(torch.tensor(text[:18]), of_torch)
    case.run(text[:18], of_step)
    (codes, scales), (ours, our_scales) = case.stored(of_torch, 18), case.stored(of_step, 18)
    np.testing.assert_allclose(our_scales, scales, rtol=1e-2)
    assert np.abs(ours.astype(int) - codes).max() <= 2 and (ours != codes).mean() < 0.01
    # From here on both read the same: what torch has stored.
    for block, source in zip(of_step.blocks, of_torch.blocks, strict=True):
        case.pool.data[:, block], case.pool.scales[:, block] = case.pool.data[:, source], case.pool.scales[:, source]
    found = case.run(text[18:], of_step)[0]
    expected = case.model.logits(case.model(torch.tensor(text[18:]), of_torch))[0]
    assert relative_error(found, expected) < 1e-3
    plain = KVCache(replace(case.spec, kv="auto"), CAPACITY)
    case.model(torch.tensor(text[:18]), plain)
    exact = case.model.logits(case.model(torch.tensor(text[18:]), plain))[0]
    assert 1e-3 < relative_error(found, exact) < 5e-2  # what the rounding costs


def test_what_is_stored_is_what_was_computed_to_half_a_code(folder):
    case = Case(folder)
    plain, text = KVCache(replace(case.spec, kv="auto"), CAPACITY), torch.tensor(some_tokens(9))
    cache = case.sequence()
    case.model(text, plain)
    case.model(text, cache)
    codes, scales = case.stored(cache, 9)
    exact = plain.data[0, 0, :, :, :9]  # of the first layer, which has seen no rounding
    assert (np.abs(codes[0] * scales[0, ..., None] - exact) <= 0.5001 * scales[0, ..., None]).all()
    assert (np.abs(codes).max(-1) == 127).all()


def test_sequences_beside_each_other_have_the_bits_of_each_alone(folder):
    case = Case(folder)
    texts = [some_tokens(length, seed) for seed, length in enumerate((11, 3, 17))]
    truth = [case.run(text, case.sequence()) for text in texts]
    caches, found = [case.sequence() for _ in texts], [[] for _ in texts]
    for at in range(17):
        going = [n for n, text in enumerate(texts) if at < len(text)]
        logits = case.step.rows([Row(caches[n], texts[n][at]) for n in going], "exact")
        for n, row in zip(going, logits, strict=True):
            found[n].append(row.clone())
    for rows, expected in zip(found, truth, strict=True):
        assert (torch.stack(rows) == expected).all()
    # And however its prompt is cut.
    cut = case.sequence()
    pieces = [
        case.step.rows([Row(cut, token) for token in texts[2][a:b]], "exact").clone() for a, b in ((0, 5), (5, 17))
    ]
    assert (torch.cat(pieces) == truth[2]).all()


def test_a_shared_prefix_is_read_and_not_written(folder):
    case, prefix = Case(folder), some_tokens(2 * BLOCK)
    endings = [some_tokens(3, seed) for seed in (5, 6)]
    truth = [case.run(prefix + ending, case.sequence())[-3:] for ending in endings]
    first = case.sequence()
    case.run(prefix, first)
    kept = [part.copy() for part in case.stored(first, 2 * BLOCK)]
    for ending, expected in zip(endings, truth, strict=True):
        other = case.sequence()
        other.begin_with(first.blocks)
        assert (case.run(ending, other) == expected).all()
    assert all((now == then).all() for now, then in zip(case.stored(first, 2 * BLOCK), kept, strict=True))
