"""What is chosen before anything is built: strategy by what is prepared, devices, threads; and how it is printed."""

import pytest
import torch
from model_cases import make_model
from packed_cases import place

from hybrid import EngineConfig
from hybrid.errors import ArtifactError, ContextError, InputError
from hybrid.model.loader import ModelFolder
from hybrid.runtime.plan import plan_run
from placement import Placement

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    make_model("llama-relu", tmp_path)
    return ModelFolder.open(tmp_path)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("hybrid.runtime.plan.available_cpus", lambda: 16)


def test_a_sparse_model_that_is_not_prepared_runs_exact_with_a_note(folder):
    plan = plan_run(folder)
    assert plan.strategy == "exact" and plan.bank is None
    assert plan.notices[0].startswith("not prepared, so exact: every gate is computed, nothing is lost; faster after: ")
    assert "hybrid prepare" in plan.notices[0]
    place(folder.path)  # a placement alone does not make it learned
    assert plan_run(folder).strategy == "exact"


def test_predictors_that_cannot_be_read_are_an_error_and_no_reason_for_exact(folder):
    place(folder.path)
    (folder.path / "hybrid" / "predictors.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"predictors\.safetensors is not a predictor"):
        plan_run(folder)


def test_who_asks_for_learned_is_told_of_exact(folder):
    with pytest.raises(
        ArtifactError, match=r"make it with: hybrid prepare .*; or use sparsity exact, which needs none"
    ):
        plan_run(folder, EngineConfig("learned"))


def test_a_dense_model_is_dense_and_takes_no_sparse_strategy(tmp_path):
    make_model("mistral-full", tmp_path)
    folder = ModelFolder.open(tmp_path)
    plan = plan_run(folder)
    assert plan.strategy == "dense" and len(plan.notices) == 1
    assert plan.notices[0].startswith("silu fires densely: every neuron is computed; fewer after: hybrid prepare")
    with pytest.raises(InputError, match="silu fires densely, so sparsity exact has no meaning; use proxy or dense"):
        plan_run(folder, EngineConfig("exact"))


def test_the_summary_says_what_this_machine_does(folder):
    place(folder.path)  # made for a GPU, all layers there
    assert plan_run(folder).summary() == "exact; CPU, 16 threads; context 64"
    config = EngineConfig("dense", context=9, threads=1)
    assert plan_run(folder, config).summary() == "dense; CPU, 1 thread; context 9"
    half = Placement.random(folder.spec, 0.5, 0)
    half.hot[2], half.layer_on_gpu[2] = 0, False
    plan = plan_run(folder, EngineConfig("exact"), half, device=torch.device("cuda"))
    share = f"{100 * half.hot.sum() / (3 * 85):.1f}%"
    assert plan.summary() == f"exact; GPU with {share} of neurons hot of 2 of 3 layers, CPU with 14 threads; context 64"
    assert (
        plan_run(folder, EngineConfig("exact"), Placement.all_cold(folder.spec), device=torch.device("cuda")).gpu
        is None
    )


def test_a_context_beyond_the_model_is_refused_before_anything_is_read(folder):
    with pytest.raises(ContextError, match="context 65 is out of range: this model takes 1 to 64 tokens"):
        plan_run(folder, EngineConfig(context=65))


def test_prompts_are_read_fast_unless_asked_otherwise(folder):
    place(folder.path)
    everything = Placement.random(folder.spec, 0.5, 0)
    gpu = {"placement": everything, "device": torch.device("cuda")}
    assert [plan_run(folder).prefill, plan_run(folder, **gpu).prefill] == ["fast", "fast"]
    for found in (plan_run(folder, EngineConfig(prefill="precise"), **more) for more in ({}, gpu)):
        assert found.prefill == "precise"
