"""`certified` from end to end: the bits of `exact` on the CPU, its tokens on two devices, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE
from model_cases import make_model
from packed_cases import pack
from step_cases import (
    GREEDY,
    PROMPT,
    StepCase,
    answer,
    copies_of,
    relative_error,
    some_tokens,
    tiny_model,
    use_references,
)

from cpu_kernels.worker_pool import WorkerPool
from hybrid import Engine, EngineConfig
from hybrid.bench.bench import Bench, BenchConfig
from hybrid.bench.devices import known_firing
from hybrid.console import progress
from hybrid.errors import ArtifactError, InputError
from hybrid.formats.bundle import Bundle
from hybrid.model.ffn import FFNCounters, FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.loader import ModelFolder
from hybrid.offline.certify import certify
from hybrid.offline.project import Project
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.plan import plan_run
from placement.cost import UNCERTAIN
from placement.placement import Placement

pytest.importorskip("transformers")
CLOSE = 5e-6  # relative, of two devices
# ReGLU, biases, not gated with ReLU and its square, FATReLU, dReLU, FFN beside attention, a norm after the FFN.
FAMILIES = ["llama-relu", "opt", "nemotron", "prosparse", "bamboo", "falcon"]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)


@pytest.fixture
def _references(monkeypatch):
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def steps(folder, threads=1, placed=False):
    """A step of the CPU, its cache and counters."""
    opened = ModelFolder.open(folder)
    runtime = FFNRuntime("certified", WorkerPool(threads), opened.spec.d_model, opened.spec.d_ff)
    model = opened.build(runtime, Placement.random(opened.spec, 0.4, 0) if placed else None, None)
    for ffn in model.ffns:
        ffn.set_copies(copies_of(ffn))
    cache = KVCache(opened.spec, 40)
    return CpuStep(model, cache, runtime), cache, runtime


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_bits_of_exact(models, name, dtype):
    step, cache, runtime = steps(tiny_model(name, models, dtype), 2 if dtype == "bf16" else 1, dtype == "f32")
    for token in some_tokens(7):
        length = cache.length
        exact = step.run(token, "exact").clone()
        fired = runtime.counters.fired
        cache.truncate(length)
        runtime.counters = FFNCounters()
        assert (step.run(token, "certified") == exact).all()
        assert fired == runtime.counters.fired <= runtime.counters.computed < runtime.counters.neurons
        runtime.counters = FFNCounters()
    runtime.pool.close()


@pytest.mark.parametrize(("threads", "rows"), [(1, 2), (3, 5), (2, 32)])
def test_rows_of_a_step_have_the_bits_of_exact(models, threads, rows):
    step, cache, runtime = steps(tiny_model("llama-relu", models, "bf16"), threads)
    given = [Row(cache, token) for token in some_tokens(rows)]
    exact = step.rows(given, "exact").clone()
    cache.truncate(0)
    runtime.counters = FFNCounters()
    assert (step.rows(given, "certified") == exact).all()
    counters = runtime.counters
    assert counters.fired <= counters.computed < counters.neurons and counters.union <= counters.computed
    runtime.pool.close()


PLACEMENTS = [
    {"share": 0.0},
    {"share": 1.0},
    {"share": 0.4, "on_cpu": (1,), "head": False},
    {"share": 0.4, "zero_copy": 20},
]


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("placed", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama-relu", "opt", "falcon"])
def test_two_devices_compute_what_the_cpu_does(models, name, placed):
    case = StepCase(tiny_model(name, models), certified=True, **placed)
    for token in some_tokens(5):
        expected = case.expected([token], "exact")
        assert relative_error(case.run(token, "certified"), expected) < CLOSE
        case.step.rest()
    case.close()


def test_the_kernels_themselves(models):
    """In the interpreter where there is no GPU: a batch and one token after it."""
    folder, tokens = tiny_model("llama-relu", models, layers=1), some_tokens(3)
    case = StepCase(folder, zero_copy=20, threads=1 if DEVICE == "cpu" else 2, certified=True)
    expected = case.expected(tokens, "exact")
    assert relative_error(case.few(tokens, "certified"), expected) < CLOSE
    case.close()


@pytest.fixture
def folder(tmp_path):
    make_model("llama-relu", tmp_path / "model", vocab_size=131, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return tmp_path / "model"


def make_copies(folder):
    return certify(Project(folder, None, 1, progress), progress)


def test_an_engine_answers_as_dense_does(folder, tmp_path):
    """Also by a packed copy, whose neurons lie in another order."""
    pack(folder, tmp_path / "packed", "bf16")
    for path in (folder, tmp_path / "packed"):
        made = make_copies(path)
        assert set(made.made_from) == {"dtype"}
        answers = []
        for sparsity in ("dense", "certified"):
            with Engine.load(path, EngineConfig(sparsity, context=40, threads=2, vram_budget=0)) as engine:
                assert engine.plan.strategy == sparsity
                answers.append(answer(engine))
        assert answers[0] == answers[1] and len(answers[0]) == GREEDY.max_new_tokens


@pytest.mark.usefixtures("_references")
def test_an_engine_of_two_devices_answers_as_dense_does(folder):
    make_copies(folder)
    placement = Placement.random(ModelFolder.open(folder).spec, 0.4, 0)
    answers = []
    for sparsity in ("dense", "certified"):
        config = EngineConfig(sparsity, context=40, threads=2)
        with Engine.load(folder, config, placement, device=torch.device(DEVICE)) as engine:
            answers.append(answer(engine, PROMPT))
    assert answers[0] == answers[1]


def test_auto_takes_certified_where_nothing_else_is_prepared(folder):
    opened = ModelFolder.open(folder)
    assert plan_run(opened, EngineConfig(vram_budget=0)).strategy == "exact"
    make_copies(folder)
    assert plan_run(opened, EngineConfig(vram_budget=0)).strategy == "certified"


def test_missing_copies_name_the_command(folder):
    with pytest.raises(ArtifactError, match=r"copies\.safetensors is missing; make it with: hybrid certify .*model"):
        plan_run(ModelFolder.open(folder), EngineConfig("certified", vram_budget=0))


def test_rows_in_blocks_have_nothing_to_certify(folder, tmp_path):
    pack(folder, tmp_path / "blocks", "int8")
    plan = plan_run(ModelFolder.open(tmp_path / "blocks"), EngineConfig("certified", vram_budget=0))
    assert plan.strategy == "exact"
    assert any("so certified is exact here" in notice for notice in plan.notices)
    with pytest.raises(InputError, match="nothing to certify"):
        make_copies(tmp_path / "blocks")


def test_copies_of_another_type_are_not_taken(folder, tmp_path):
    """Their bounds are of other rows: beside a packed model in blocks `auto` passes them by, else they are refused."""
    make_copies(folder)
    placement = Placement.all_cold(ModelFolder.open(folder).spec)
    bundle = folder / "hybrid"
    replace(placement, made_from={"strategy": "certified"}).save(bundle / "placement.safetensors")
    assert plan_run(ModelFolder.open(folder), EngineConfig(vram_budget=0)).strategy == "certified"
    for dtype in ("int4", "bf16"):
        pack(folder, tmp_path / dtype, dtype)
        assert not (tmp_path / dtype / "hybrid" / "copies.safetensors").exists()
    there = EngineConfig(bundle=bundle, vram_budget=0)
    assert plan_run(ModelFolder.open(tmp_path / "int4"), there).strategy == "exact"
    with pytest.raises(ArtifactError, match="copies of weights in f32, these are in bf16; make them with: "):
        plan_run(ModelFolder.open(tmp_path / "bf16"), replace(there, sparsity="certified"))
    spec = ModelFolder.open(tmp_path / "bf16").spec
    assert known_firing(Bundle.of(tmp_path / "bf16", spec, bundle), spec).uncertain == UNCERTAIN  # bench goes on


def test_copies_go_along_with_rows_that_stay_as_they_are(tmp_path):
    make_model("llama-relu", tmp_path / "m", torch.bfloat16)
    make_copies(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "packed", "bf16")
    config = EngineConfig("certified", vram_budget=0)
    assert plan_run(ModelFolder.open(tmp_path / "packed"), config).strategy == "certified"


@pytest.mark.parametrize("strategy", ["learned", "certified", "proxy"])
def test_a_step_refuses_what_it_was_not_loaded_for(folder, strategy):
    with Engine.load(folder, EngineConfig("exact", context=40, threads=1, vram_budget=0)) as engine:
        cache = KVCache(engine.model.spec, 8)
        with pytest.raises(RuntimeError, match=f"was not loaded for {strategy}"):
            CpuStep(engine.model, cache, engine.runtime).rows([Row(cache, 5)], strategy)


def test_bench_says_what_the_engine_does_not_run(folder, tmp_path):
    pack(folder, tmp_path / "blocks", "int8")
    config, wanted = (
        EngineConfig("certified", context=40, threads=1, vram_budget=0),
        BenchConfig(("certified",), 4, 2, 1),
    )
    refused = pytest.raises(InputError, match=r"certified does not run .* loaded for exact: .*certified is exact here")
    with Engine.load(tmp_path / "blocks", config) as engine, refused:
        Bench(engine, wanted)


def test_an_activation_that_is_never_0_is_refused(tmp_path):
    make_model("llama-tied-mha-bias", tmp_path)
    with pytest.raises(InputError, match="fires densely"):
        plan_run(ModelFolder.open(tmp_path), EngineConfig("certified", vram_budget=0))
    with pytest.raises(InputError, match="fires densely"):
        make_copies(tmp_path)


def test_copies_follow_a_placement(folder):
    """Every neuron keeps its own copy, wherever it lies."""
    make_copies(folder)
    opened = ModelFolder.open(folder)
    placement = Placement.random(opened.spec, 0.4, 3)
    plan = plan_run(opened, EngineConfig("certified", vram_budget=0), placement)
    runtime = FFNRuntime("certified", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff)
    model = opened.build(runtime, placement, None, plan.bundle)
    for ffn in model.ffns:
        assert ffn.certificate is not None
        np.testing.assert_array_equal(ffn.certificate.rows, copies_of(ffn).deciding.rows)
