"""The compiled decode step: against transformers for each family, torch on the same matrices, and its counts."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from matrix_cases import THREADS
from model_cases import CASES, make_model
from packed_cases import pack

from cpu_kernels.activations import activate_ref, activate_up_ref
from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNCounters, FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.loader import ModelFolder
from hybrid.runtime.cpu_step import CpuStep
from placement.placement import Placement
from predictor.low_rank import LowRankPredictor

pytest.importorskip("transformers")
TOLERANCE = 1e-4
VOCAB = 131
STORED = ("bf16", "f16", "int8", "int4")


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Sequences of these tests fill several blocks of the KV cache."""
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)


def build(folder, threads=1, placed=False):
    opened = ModelFolder.open(folder)
    runtime = FFNRuntime("dense", WorkerPool(threads), opened.spec.d_model, opened.spec.d_ff)
    return opened.build(runtime, Placement.random(opened.spec, 0.4, 0) if placed else None, None)


def some_tokens(count, seed=1):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def decoder(model, prompt, capacity=44):
    """A step and its cache, once the prompt was read through torch."""
    cache = KVCache(model.spec, capacity)
    if len(prompt):
        model(prompt, cache)
    return CpuStep(model, cache, model.ffns[0].runtime), cache


def decode(step, tokens, strategy):
    return torch.stack([step.run(int(token), strategy).clone() for token in tokens])


def relative_error(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_matches_transformers_between_prefills_and_across_blocks(name, tmp_path):
    truth, tokens = make_model(name, tmp_path), some_tokens(44)
    model = build(tmp_path)
    expected = truth(tokens[None]).logits[0]
    for strategy in ("dense", "exact"):
        step, cache = decoder(model, tokens[:13])
        assert relative_error(decode(step, tokens[13:33], strategy), expected[13:33]) < TOLERANCE
        assert relative_error(model.logits(model(tokens[33:40], cache)), expected[33:40]) < TOLERANCE
        assert relative_error(decode(step, tokens[40:], strategy), expected[40:]) < TOLERANCE
        assert cache.length == 44


@pytest.mark.parametrize("name", ["llama-relu", "opt"])
def test_an_empty_cache_and_forgotten_tokens(name, tmp_path):
    make_model(name, tmp_path)
    model, tokens = build(tmp_path), some_tokens(12)
    step, cache = decoder(model, tokens[:0])
    first = decode(step, tokens, "dense")
    assert relative_error(first, model.logits(model(tokens))) < TOLERANCE
    cache.truncate(5)
    assert (decode(step, tokens[5:], "dense") == first[5:]).all()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder of a case in a stored type, made once; f32 is not packed."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            if dtype == "f32":
                made[name, dtype] = tmp_path_factory.mktemp(name)
                make_model(name, made[name, dtype])
            else:
                made[name, dtype] = tmp_path_factory.mktemp("packed") / name
                pack(get(name, "f32"), made[name, dtype], dtype)
        return made[name, dtype]

    return get


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", ["llama-relu", "opt"])
def test_matches_torch_on_the_same_matrices_of_every_type(name, dtype, stored):
    check_packed(name, dtype, ["dense", "exact"], stored)


def check_packed(name, dtype, strategies, stored):
    """Blocks add the rounding of each product's input to 16 bits; it moves keys to the next f16, so theirs are f32."""
    model, tokens = build(stored(name, dtype), max(THREADS)), some_tokens(40)
    assert model.ffns[0].up.dtype == dtype
    kept = replace(model.spec, dtype="f32") if "int" in dtype else model.spec
    expected = model.logits(model(tokens, KVCache(kept, 44)))[20:]
    for strategy in strategies:
        cache = KVCache(kept, 44)
        model(tokens[:20], cache)
        step = CpuStep(model, cache, model.ffns[0].runtime)
        assert relative_error(decode(step, tokens[20:], strategy), expected) < TOLERANCE


@pytest.mark.parametrize(("name", "dtype"), [("nemotron", "int8"), ("persimmon", "int4"), ("nanochat", "int8")])
@pytest.mark.parametrize("strategy", ["dense", "exact"])
def test_packed_parts_that_were_folded(name, dtype, strategy, stored):
    check_packed(name, dtype, [strategy], stored)


@pytest.mark.parametrize(
    ("name", "dtype"), [("falcon-grouped", "int4"), ("phi3", "int8"), ("gemma3", "int4"), ("granite", "int8")]
)
def test_packed_parts_of_dense_families(name, dtype, stored):
    check_packed(name, dtype, ["dense"], stored)


@pytest.mark.parametrize("dtype", ["f32", *STORED])
def test_same_bits_for_any_number_of_threads(dtype, stored):
    model, tokens = build(stored("llama-relu", dtype), max(THREADS)), some_tokens(20)
    for ffn in model.ffns:
        ffn.set_predictor(random_predictor(ffn))
    runtime, found = model.ffns[0].runtime, []
    for threads in THREADS:
        step, _ = decoder(model, tokens[:9])  # with buffers for all, as another number of them is compiled again
        runtime.pool, whole = WorkerPool(threads), runtime.pool
        found.append(torch.cat([decode(step, tokens[9:], strategy) for strategy in ("dense", "exact", "learned")]))
        runtime.pool.close()
        runtime.pool = whole
    assert all((other == found[0]).all() for other in found[1:])


def random_predictor(ffn, rank=5):
    """Names about half of the neurons."""
    neurons, d = ffn.up.shape
    g = torch.Generator().manual_seed(neurons)
    fc1, fc2 = (
        torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in ((rank, d), (neurons, rank))
    )
    scales = torch.rand(rank, generator=g) / 50, torch.rand(neurons, generator=g) / 50
    return LowRankPredictor(fc1, scales[0], torch.randn(rank, generator=g), fc2, scales[1], torch.zeros(neurons), 0.1)


@contextmanager
def watched(model, hot, predictors):
    """Torch computes the neurons that predictors name, all where there are none; yields counts of what fired."""
    counters = FFNCounters()

    def every(x, first=0, *, ffn, predictor):
        m, name = ffn.matrices, ffn.act.name
        named = torch.ones(1, ffn.up.shape[0], dtype=torch.bool) if predictor is None else predictor.mask(x)
        up = F.linear(x, m.up.widen(), m.up_bias)
        hidden = activate_ref(name, up if m.gate is None else F.linear(x, m.gate.widen(), m.gate_bias))
        beside = 1 if m.gate is None else activate_up_ref(name, up)
        fired = ((hidden * beside if name == "drelu" else hidden) != 0) & named
        counters.neurons += named.numel()
        counters.computed += int(named.sum())
        counters.fired += int(fired.sum())
        counters.fired_hot += int(fired[:, :hot].sum())
        return (hidden * beside * named) @ m.down.widen()

    for ffn, predictor in zip(model.ffns, predictors, strict=True):
        ffn.every = partial(every, ffn=ffn, predictor=predictor)
    yield counters
    for ffn in model.ffns:
        del ffn.every


@pytest.mark.parametrize("name", ["llama-relu", "opt", "bamboo", "prosparse", "falcon"])
@pytest.mark.parametrize("strategy", ["dense", "exact", "learned"])
def test_counts_and_logits_of_each_strategy(strategy, name, stored):
    """Token by token through torch, with hooks that leave out and count neurons, is the truth."""
    model, tokens = build(stored(name, "f32"), placed=True), some_tokens(30)
    hot, predictors = model.ffns[0].hot, [random_predictor(ffn) for ffn in model.ffns]
    assert hot == round(0.4 * model.spec.d_ff)
    cache = KVCache(model.spec, 44)
    model(tokens[:20], cache)
    with watched(model, hot, predictors if strategy == "learned" else [None] * len(predictors)) as truth:
        expected = torch.cat([model.logits(model(token, cache)) for token in tokens[20:].split(1)])
    for ffn, predictor in zip(model.ffns, predictors, strict=True):
        ffn.set_predictor(predictor)
    step, _ = decoder(model, tokens[:20])
    assert relative_error(decode(step, tokens[20:], strategy), expected) < TOLERANCE
    counters = model.ffns[0].runtime.counters
    assert counters.neurons == truth.neurons == 10 * model.spec.n_layers * model.spec.d_ff
    assert (counters.fired, counters.fired_hot) == (truth.fired, truth.fired_hot)
    assert 0 < counters.fired_hot < counters.fired
    # `exact` counts neurons whose gate came out 0 as not computed.
    assert counters.computed == (truth.fired if strategy == "exact" else truth.computed)
    assert (counters.predictor_seconds > 0) == (strategy == "learned")
    assert counters.attention_seconds > 0 and counters.ffn_seconds > 0 and counters.head_seconds > 0


def test_loading_the_kernels_changes_nothing(stored):
    model, tokens = build(stored("llama-relu", "f32")), some_tokens(12)
    step, cache = decoder(model, tokens[:10])
    kept = cache.data.tobytes()  # what was never written may be NaN
    step.load_kernels()
    assert cache.length == 10 and cache.data.tobytes() == kept
    other, _ = decoder(model, tokens[:10])
    assert (decode(step, tokens[10:], "exact") == decode(other, tokens[10:], "exact")).all()
