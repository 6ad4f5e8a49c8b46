"""Engines whose model is on two devices: the CPU's tokens, whatever is where, and the bytes of the plan."""

import asyncio

import pytest
import torch
from gpu_cases import DEVICE
from model_cases import make_model
from safetensors.torch import load_file, save_file
from step_cases import VOCAB, random_predictor, some_tokens, tiny_model, use_references

from hybrid import AsyncEngine, Engine, EngineConfig, Request, SamplingSettings
from hybrid.errors import InputError
from hybrid.model.loader import ModelFolder
from hybrid.offline.certify import certify
from hybrid.offline.project import Project
from hybrid.runtime.gpu.runner import GpuRunner
from hybrid.runtime.load import load_model
from hybrid.runtime.plan import plan_run
from hybrid.runtime.runner import CpuRunner
from placement.placement import Placement
from placement.plan import VramPlan
from placement.workspace import copy_bytes, predictor_bytes
from predictor.bank import PredictorBank
from profiler.common.openmp import torch_threads
from profiler.common.progress import no_progress

pytest.importorskip("transformers")
GREEDY = SamplingSettings(temperature=0, max_new_tokens=6)
SHORT, LONG = some_tokens(5, 2), some_tokens(15, 3)  # the decode step's, and prefill's


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def placed(folder, share=0.4, on_cpu=(), head=True):
    placement = Placement.random(ModelFolder.open(folder).spec, share, 0)
    placement.hot[list(on_cpu)], placement.layer_on_gpu[list(on_cpu)] = 0, False
    return Placement(placement.order, placement.hot, placement.layer_on_gpu, head, placement.model_fingerprint)


def load(folder, placement, strategy="exact", device=DEVICE, bank=None):
    config = EngineConfig(strategy, context=40, threads=2, vram_budget=None if device else 0)
    return Engine.load(folder, config, placement, bank, torch.device(device) if device else None)


def bank_of(folder):
    with load(folder, placed(folder), device=None) as engine:
        return PredictorBank(tuple(random_predictor(ffn) for ffn in engine.model.ffns))


@torch_threads(3)
def conversation(engine):
    """Tokens of answers to a short prompt, to a longer one that goes on from it, to another, and to that again."""
    answers = []
    first = engine.generate(SHORT, GREEDY)
    answers.append([step.token for step in first])
    for prompt in ([*SHORT, *answers[0], *LONG[:9]], LONG, LONG):
        steps = list(engine.generate(prompt, GREEDY))
        answers.append([step.token for step in steps])
        cached = steps[-1].stats.cached_tokens
        assert cached == {len(SHORT) + 15: len(SHORT) + 5}.get(len(prompt), 0 if len(answers) == 3 else len(LONG) - 1)
    assert torch.get_num_threads() == 3  # as many as before
    return answers


CASES = [
    ("llama-relu", "exact", {}),
    ("llama-relu", "dense", {"share": 0.0}),
    ("llama-relu", "exact", {"share": 1.0}),
    ("opt", "exact", {"share": 0.4, "on_cpu": (0,), "head": False}),
    ("mistral-window", "learned", {"share": 0.4}),
    ("qwen3", "dense", {"share": 1.0, "on_cpu": (1,)}),
    ("falcon-grouped", "learned", {"share": 0.4}),
    ("gemma3", "dense", {"share": 0.4}),
    ("persimmon", "exact", {"share": 0.4}),
    ("olmo2", "dense", {"share": 0.0}),
]


@pytest.mark.parametrize(("name", "strategy", "where"), CASES)
def test_the_cpus_tokens_for_any_placement(models, name, strategy, where):
    """With prompts that are reused, and the same once more after `reset`."""
    folder = tiny_model(name, models)
    placement, bank = placed(folder, **where), bank_of(folder) if strategy == "learned" else None
    with load(folder, placement, strategy, device=None, bank=bank) as engine:
        assert isinstance(engine.runner, CpuRunner)
        expected = conversation(engine)
    with load(folder, placement, strategy, bank=bank) as engine:
        assert isinstance(engine.runner, GpuRunner)
        assert conversation(engine) == expected
        engine.reset()
        assert conversation(engine) == expected
        assert "hot neurons are on the GPU" in engine.describe_placement()


def test_sampling_takes_the_same_logits(models):
    folder, settings = tiny_model("llama-relu", models), SamplingSettings(temperature=0.9, seed=4, max_new_tokens=8)
    answers = []
    for device in (None, DEVICE):
        with load(folder, placed(folder), device=device) as engine:
            answers.append([step.token for step in engine.generate(SHORT, settings)])
    assert answers[0] == answers[1] and len(set(answers[0])) > 2


def test_statistics(models):
    folder = tiny_model("llama-relu", models)
    with load(folder, placed(folder), "learned", bank=bank_of(folder)) as engine:
        *_, last = engine.generate(SHORT, GREEDY)
    assert 0 < last.stats.active_share < 1 and 0 < last.stats.hot_share < 1 and last.stats.ffn_seconds > 0


def test_the_last_token_of_the_context(models):
    folder, answers = tiny_model("llama-relu", models), []
    for device in (None, DEVICE):
        with load(folder, placed(folder, on_cpu=(1,)), device=device) as engine:
            steps = list(engine.generate(some_tokens(35), SamplingSettings(temperature=0, max_new_tokens=50)))
            answers.append([step.token for step in steps])
            assert steps[-1].finish == "context"
    assert answers[0] == answers[1] and len(answers[0]) == 5


def test_a_placement_without_a_gpu_part_runs_on_the_cpu(models):
    folder = tiny_model("llama-relu", models)
    with load(folder, Placement.all_cold(ModelFolder.open(folder).spec)) as engine:
        assert isinstance(engine.runner, CpuRunner) and "No GPU is used" in engine.describe_placement()


@pytest.mark.parametrize(("name", "strategy", "where"), CASES)
def test_what_is_taken_is_within_the_plan(models, name, strategy, where):
    """All in one allocation, of which no byte is left over."""
    folder = tiny_model(name, models)
    placement, bank = placed(folder, **where), bank_of(folder) if strategy == "learned" else None
    with load(folder, placement, strategy, bank=bank) as engine:
        spec, arena = engine.model.spec, engine.runner.arena
        sizes = predictor_bytes(spec.d_model, spec.d_ff, 5) if bank is not None else 0
        plan = VramPlan(spec, 40, (sizes,) * spec.n_layers, reserve=0)
        assert arena.used == len(arena._slab)
        planned, spent = dict(plan.rows(placement.choice)), dict(arena.spent)
        assert spent["hot neurons"] == planned["hot neurons"] if planned["hot neurons"] else "hot neurons" not in spent
        assert spent["KV cache"] == planned["KV cache"]
        assert arena.used <= plan.total_bytes(placement.choice), f"{spent} of {planned}"


@pytest.mark.parametrize("name", ["llama-relu", "opt"])
def test_certificates_take_what_is_planned(models, name):
    """Of one layer on the GPU and one on the CPU, with biases and without."""
    folder = tiny_model(name, models)
    spec = ModelFolder.open(folder).spec
    project = Project(folder, None, 1, no_progress)
    certify(project, no_progress)
    placement = placed(folder, on_cpu=(0,))
    with load(folder, placement, "certified") as engine:
        arena = engine.runner.arena
        plan = VramPlan(spec, 40, (0,) * spec.n_layers, reserve=0, certified=True)
        planned = dict(plan.rows(placement.choice))
        assert arena.spent["certificates"] == planned["certificates"] == copy_bytes(spec)
        assert arena.used <= plan.total_bytes(placement.choice)
    project.bundle.copies.unlink()


@pytest.mark.parametrize(
    ("name", "strategy", "where"), [("llama-relu", "exact", {}), ("opt", "learned", {"on_cpu": (0,), "head": False})]
)
def test_answers_given_together_are_those_of_one_engine(models, name, strategy, where):
    """Prompts of the step's and of prefill's, two of which begin alike, and draws; within the plan of 32 rows."""
    folder = tiny_model(name, models)
    placement, bank = placed(folder, **where), bank_of(folder) if strategy == "learned" else None
    drawn = SamplingSettings(temperature=1, top_k=9, seed=5, max_new_tokens=6)
    asked = [(SHORT, GREEDY), (LONG, GREEDY), (LONG[:11], drawn), (LONG[3:], GREEDY), (SHORT[1:], drawn)]
    with load(folder, placement, strategy, bank=bank) as engine:
        expected = []
        for prompt, settings in asked:
            engine.reset()
            expected.append([step.token for step in engine.generate(prompt, settings)])
    config = EngineConfig(strategy, context=40, threads=2, kv_tokens=400)
    loaded = load_model(plan_run(ModelFolder.open(folder), config, placement, bank, torch.device(DEVICE)))
    served = AsyncEngine(loaded)
    runner = served._scheduler._runner

    async def tokens_of(prompt, settings):
        return [step.step.token async for step in served.generate(Request(tuple(prompt), settings))]

    async def all_of():
        found = await asyncio.gather(*(tokens_of(*each) for each in asked))
        await served.close()
        return found

    assert asyncio.run(all_of()) == expected
    assert runner.most_rows == 32 and served.figures().rows_total > served.figures().steps_total
    spec = loaded.plan.spec
    sizes = predictor_bytes(spec.d_model, spec.d_ff, 5) if bank is not None else 0
    plan = VramPlan(spec, 40, (sizes,) * spec.n_layers, reserve=0, batch=32, kv_tokens=400)
    planned, spent = dict(plan.rows(placement.choice)), runner.arena.spent
    assert spent["KV cache"] == planned["KV cache"]
    for part in ("decode", "prefill", "staging"):
        assert spent.get(f"workspace: {part}", 0) <= planned[f"workspace: {part}"], part
    assert runner.arena.used <= plan.total_bytes(placement.choice)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="compiles the CPU's step once more; the GPU's kernels are what counts")
def test_keys_and_values_that_f16_does_not_hold(tmp_path):
    folder, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    make_model("qwen2", folder, torch.bfloat16, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors["model.layers.1.self_attn.k_proj.bias"][5] = -2e5
    save_file(tensors, weights)
    with load(folder, placed(folder), device=None) as engine:
        expected = conversation(engine)
    with load(folder, placed(folder)) as engine:
        assert "kept in f32" in engine.notices[0] and conversation(engine) == expected
        planned = dict(VramPlan(engine.model.spec, 40, (0, 0, 0)).rows(engine.placement.choice))
        assert engine.runner.arena.spent["KV cache"] == planned["KV cache"]


def test_tokens_beyond_the_vocabulary_are_refused(models):
    folder = tiny_model("llama-relu", models)
    with load(folder, placed(folder)) as engine, pytest.raises(InputError, match=f"0 to {VOCAB - 1}"):
        engine.generate([VOCAB], GREEDY)
