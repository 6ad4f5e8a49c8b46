"""The compiled decode step over rows of several sequences: the bits of each row alone, whatever is beside it."""

import numpy as np
import pytest
import torch
from matrix_cases import THREADS
from step_cases import VOCAB, random_predictor, some_tokens, tiny_model

from cpu_kernels.contract import MAX_BATCH
from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import ContextError
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, KVPool, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.cpu_step import CpuStep
from placement.placement import Placement

pytest.importorskip("transformers")
CAPACITY, BLOCK = 24, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


class Rows:
    """A model's step over a pool whose blocks sequences take in turns, so that none lies in order."""

    def __init__(self, folder, threads=2, blocks=40):
        opened = ModelFolder.open(folder)
        self.spec = opened.spec
        runtime = FFNRuntime("dense", WorkerPool(threads), self.spec.d_model, self.spec.d_ff)
        placement = Placement.all_cold(self.spec)
        placement.hot[:] = 20
        self.model = opened.build(runtime, placement, None)
        for ffn in self.model.ffns:
            ffn.set_predictor(random_predictor(ffn))
        self.pool = KVPool(self.spec, blocks * BLOCK, BLOCK)
        self.step, self.counters = CpuStep(self.model, self.sequence(), runtime), runtime.counters

    def sequence(self):
        return KVCache(self.spec, CAPACITY, self.pool)

    def alone(self, tokens, strategy):
        """Logits [t, vocab] of one sequence, token after token."""
        cache = self.sequence()
        found = torch.cat([self.step.rows([Row(cache, token)], strategy).clone() for token in tokens])
        cache.release()
        return found


@pytest.mark.parametrize("name", ["llama-relu", "opt", "falcon", "gemma3", "qwen2-window"])
@pytest.mark.parametrize("strategy", ["dense", "exact", "learned"])
def test_sequences_beside_each_other_have_the_bits_of_each_alone(name, strategy, models):
    case = Rows(tiny_model(name, models))
    if strategy != "dense" and not case.spec.fires_sparsely:
        pytest.skip("fires densely")
    texts = [some_tokens(length, seed) for seed, length in enumerate((11, 3, 17, 8, 1))]
    truth = [case.alone(text, strategy) for text in texts]
    caches, found = [case.sequence() for _ in texts], [[] for _ in texts]
    for at in range(17):
        going = [n for n, text in enumerate(texts) if at < len(text)]
        logits = case.step.rows([Row(caches[n], texts[n][at]) for n in going], strategy)
        for n, row in zip(going, logits, strict=True):
            found[n].append(row.clone())
    assert [cache.length for cache in caches] == [11, 3, 17, 8, 1]
    assert caches[2].blocks != tuple(range(caches[2].blocks[0], caches[2].blocks[0] + 3))
    for rows, expected in zip(found, truth, strict=True):
        assert (torch.stack(rows) == expected).all()


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("strategy", ["exact", "learned"])
def test_rows_of_one_sequence_are_its_tokens_one_by_one(dtype, strategy, models):
    case, text = Rows(tiny_model("llama-relu", models, dtype)), some_tokens(20)
    truth, cache = case.alone(text, strategy), case.sequence()
    pieces = [text[:3], text[3:4], text[4:]]
    found = [case.step.rows([Row(cache, token) for token in piece], strategy).clone() for piece in pieces]
    assert (torch.cat(found) == truth).all()


def test_a_full_step_and_its_counts(models):
    case = Rows(tiny_model("llama-relu", models))
    tokens = some_tokens(MAX_BATCH)
    truth = torch.cat([case.alone([token], "learned") for token in tokens])
    before, rows = vars(case.counters).copy(), [Row(case.sequence(), token) for token in tokens]
    assert (case.step.rows(rows, "learned") == truth).all()
    added = {name: value - before[name] for name, value in vars(case.counters).items()}
    every = case.spec.n_layers * case.spec.d_ff
    assert added["neurons"] == MAX_BATCH * every
    # What rows count for themselves is what they counted alone; their union is read once.
    for name in ("computed", "fired", "fired_hot"):
        assert added[name] == before[name]
    assert added["computed"] / MAX_BATCH < added["union"] <= every
    for wrong, problem in ((rows + rows[:1], "33"), ([], "0")):
        with pytest.raises(ValueError, match=f"got {problem}"):
            case.step.rows(wrong, "learned")


@pytest.mark.parametrize("threads", THREADS)
def test_same_bits_for_any_number_of_threads(threads, models):
    case, tokens = Rows(tiny_model("llama-relu", models), threads), some_tokens(9)
    found = case.step.rows([Row(case.sequence(), token) for token in tokens], "learned").clone()
    other = Rows(tiny_model("llama-relu", models), 1)
    assert (other.step.rows([Row(other.sequence(), token) for token in tokens], "learned") == found).all()


def test_a_shared_prefix_is_read_and_not_written(models):
    case, prefix = Rows(tiny_model("llama-relu", models)), some_tokens(2 * BLOCK)
    endings = [some_tokens(3, seed) for seed in (5, 6)]
    truth = [case.alone(prefix + ending, "dense")[-3:] for ending in endings]
    first = case.sequence()
    case.step.rows([Row(first, token) for token in prefix], "dense")
    kept = case.pool.data[:, list(first.blocks)].copy()
    others = [case.sequence() for _ in endings]
    for other in others:
        other.begin_with(first.blocks)
    for at in range(3):
        rows = [Row(other, ending[at]) for other, ending in zip(others, endings, strict=True)]
        found = case.step.rows(rows, "dense")
        assert all((row == logits[at]).all() for row, logits in zip(found, truth, strict=True))
    assert (case.pool.data[:, list(first.blocks)] == kept).all()
    assert [case.pool.references(block) for block in first.blocks] == [3, 3]


def test_a_pool_that_is_full_is_said_and_changes_nothing(models):
    case = Rows(tiny_model("llama-relu", models), blocks=1)
    first, second = case.sequence(), case.sequence()
    case.step.rows([Row(first, 5)], "dense")
    with pytest.raises(ContextError, match="blocks that are free"):
        case.step.rows([Row(first, 6), Row(second, 7)], "dense")
    assert (first.length, second.length, case.pool.free) == (1, 0, 0)
    assert np.isfinite(case.step.rows([Row(first, VOCAB - 1)], "dense").numpy()).all()
