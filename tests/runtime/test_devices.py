"""Which GPU is used and which placement, with a stand-in for the GPU that has as much free memory as a test says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from placement_cases import NO_GPU, ROUND_HARDWARE, small_spec

from hybrid.errors import ArtifactError, BudgetError
from hybrid.formats.bundle import Bundle
from hybrid.formats.packed import PackedModel
from hybrid.runtime.devices import (
    RESERVE_BYTES,
    free_bytes,
    gpu_of,
    hardware_of,
    placement_for,
    solve_within,
    taken_bytes,
)
from placement import VramPlan
from placement.placement import Placement
from placement.plan import UNLIMITED
from placement.workspace import SERVER_ROWS
from profiler.common.artifact import ArtifactHeader
from profiler.common.hardware import HardwareProfile
from profiler.profile import NeuronProfile

GIB = 2**30
GPU = torch.device("cuda", 0)
SPEC = small_spec(n_layers=2, d_ff=128, d_model=64, vocab_size=100, fingerprint="00112233")
CONTEXT = 32


@pytest.fixture
def free(monkeypatch):
    """Pretend that a GPU is there with so many bytes free, 3 GiB until set."""
    memory = {"free": 3 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 80 * GIB))
    return memory


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def bundle(tmp_path):
    """With a hardware profile and a neuron profile; without a placement."""
    made = Bundle(tmp_path, "hybrid prepare")
    ROUND_HARDWARE.save(made.hardware)
    counts = np.random.default_rng(0).integers(0, 100, (SPEC.n_layers, SPEC.d_ff))
    header = ArtifactHeader("neuron profile", SPEC.fingerprint, {})
    inputs, documents = np.zeros((SPEC.n_layers, 1, SPEC.d_model), np.float16), np.zeros(1, np.int32)
    NeuronProfile(header, counts, 100, inputs, documents, np.zeros((1, 4), np.int32)).save(made.profile)
    return made


def folder_of(spec=SPEC, weights=None):
    return SimpleNamespace(spec=spec, weights=weights)


def store(bundle, budget, context=CONTEXT, hardware=ROUND_HARDWARE):
    """Save a placement as `hybrid place` makes it for `budget`; returns it."""
    made_from = {"vram_budget": budget, "context": context, "hardware_profile": hardware.to_json()}
    made = replace(Placement.random(SPEC, 0.5, 3), made_from=made_from)
    made.save(bundle.placement)
    return made


def choose(bundle, budget=None, gpu=GPU, spec=SPEC, strategy="exact", weights=None, kv_tokens=None):
    notices = []
    return placement_for(bundle, folder_of(spec, weights), strategy, CONTEXT, gpu, budget, notices, kv_tokens), notices


def planned(placement, spec=SPEC):
    return VramPlan(spec, CONTEXT, (0,) * spec.n_layers).total_bytes(placement.choice)


def same(one, other):
    return (one.order == other.order).all() and (one.hot == other.hot).all()


@pytest.mark.usefixtures("free")
def test_the_first_gpu_unless_none_may_be_used():
    assert gpu_of(None) == gpu_of(GIB) == gpu_of(UNLIMITED) == GPU
    assert gpu_of(0) is None


@pytest.mark.usefixtures("no_gpu")
def test_a_budget_without_a_gpu_is_refused():
    assert gpu_of(None) is gpu_of(0) is gpu_of(UNLIMITED) is None
    with pytest.raises(BudgetError, match="no GPU here that torch can use; leave the VRAM budget out, or give 0"):
        gpu_of(GIB)


def test_a_reserve_stays_free(free):
    assert free_bytes(GPU) == 2 * GIB
    free["free"] = RESERVE_BYTES - 1
    assert free_bytes(GPU) == 0
    assert taken_bytes(GPU, GIB + 5) == 6


def test_the_default_hardware_where_none_was_measured(bundle, tmp_path):
    assert hardware_of(bundle).name == "round numbers"
    assert hardware_of(Bundle(tmp_path / "none")).source == "default"
    NO_GPU.save(bundle.hardware)  # measured before the machine had one
    assert hardware_of(bundle) == HardwareProfile.load()


def test_without_a_gpu_the_stored_placement_as_it_is(bundle):
    stored = store(bundle, 5 * GIB)
    found, notices = choose(bundle, gpu=None)
    assert same(found, stored) and notices == []


def test_without_a_placement_everything_is_cold_and_a_notice_says_so(bundle, free):
    for gpu in (None, GPU):
        found, notices = choose(bundle, gpu=gpu)
        assert not found.choice.uses_gpu and ["no placement yet" in notice for notice in notices] == [True] * bool(gpu)
    with pytest.raises(ArtifactError, match=r"placement\.safetensors is missing"):
        choose(bundle, strategy="learned")


@pytest.mark.usefixtures("free")
def test_the_stored_placement_where_it_was_made_for_the_same(bundle):
    stored = store(bundle, GIB)
    for budget in (None, GIB):
        found, notices = choose(bundle, budget)
        assert same(found, stored) and notices == []


@pytest.mark.usefixtures("free")
def test_one_made_before_more_was_measured_is_kept(bundle):
    stored = store(bundle, GIB)
    for gone in ("gpu_tensor_flops", "cpu_fast_gemm_flops"):
        del stored.made_from["hardware_profile"][gone]
    stored.save(bundle.placement)
    assert same(choose(bundle)[0], stored)
    stored.made_from["hardware_profile"].clear()
    stored.save(bundle.placement)
    assert not same(choose(bundle)[0], stored)


@pytest.mark.usefixtures("free")
def test_one_for_other_hardware_is_solved_anew(bundle):
    stored = store(bundle, GIB, hardware=replace(ROUND_HARDWARE, gpu_read_bandwidth=5e11))
    found, notices = choose(bundle)
    assert not same(found, stored) and notices == []
    bundle.hardware.unlink()
    assert "placed for a default GPU: `hybrid hardware -o " in choose(bundle)[1][0]


@pytest.mark.usefixtures("free")
def test_another_budget_or_context_is_solved_anew_and_fits(bundle):
    stored = store(bundle, GIB)
    small = VramPlan(SPEC, CONTEXT, (0, 0)).workspace_bytes + 40_000
    found, _ = choose(bundle, small)
    assert 0 < planned(found) <= small and found.made_from["vram_budget"] == small and not same(found, stored)
    store(bundle, GIB, context=CONTEXT + 1)
    found, _ = choose(bundle)
    assert (found.made_from["vram_budget"], found.made_from["context"]) == (GIB, CONTEXT)
    firing = bundle.load_profile(SPEC).frequency()
    in_order = np.take_along_axis(firing, found.order.astype(np.int64), axis=1)
    assert (np.diff(in_order) <= 0).all()


@pytest.mark.usefixtures("free")
def test_a_pool_of_more_tokens_is_solved_anew_and_fits(bundle):
    store(bundle, GIB)
    tokens = 200_000
    plan = VramPlan(SPEC, CONTEXT, (0, 0), batch=SERVER_ROWS, kv_tokens=tokens)
    small = plan.workspace_bytes + plan.kv_bytes + 60_000
    found, _ = choose(bundle, small, kv_tokens=tokens)
    assert 0 < plan.total_bytes(found.choice) <= small and found.made_from["kv_tokens"] == tokens
    assert found.layer_on_gpu.sum() == 1 and choose(bundle, small)[0].layer_on_gpu.sum() == 2
    found.save(bundle.placement)
    assert same(choose(bundle, small, kv_tokens=tokens)[0], found)


@pytest.mark.usefixtures("free")
def test_the_stored_placement_is_for_keys_and_values_as_they_are_by_default(bundle):
    stored, spec = store(bundle, GIB), replace(SPEC, kv="int8")
    assert same(choose(bundle)[0], stored)
    found, _ = choose(bundle, spec=spec)
    assert not same(found, stored) and 0 < planned(found, spec) <= GIB


def test_what_is_stored_is_cut_to_what_is_free(bundle, free):
    """A placement for 2 GiB, of which less is free: it is solved anew rather than refused."""
    store(bundle, 2 * GIB)
    free["free"] = RESERVE_BYTES + VramPlan(SPEC, CONTEXT, (0, 0)).workspace_bytes + 40_000
    found, _ = choose(bundle)
    assert 0 < planned(found) <= free["free"] - RESERVE_BYTES
    free["free"] = RESERVE_BYTES
    assert not choose(bundle)[0].choice.uses_gpu


def test_a_budget_beyond_what_is_free_is_refused_but_not_unlimited(bundle, free):
    store(bundle, GIB)
    with pytest.raises(BudgetError, match=r"budget is 2\.50 GiB, the GPU has 2\.00 GiB free beside a reserve of 1"):
        choose(bundle, 5 * GIB // 2)
    found, _ = choose(bundle, UNLIMITED)
    assert found.layer_on_gpu.all() and (found.hot == SPEC.d_ff).all() and found.made_from["vram_budget"] == 2 * GIB


@pytest.mark.usefixtures("free")
def test_models_that_fire_densely_need_no_artefacts(tmp_path):
    spec = replace(SPEC, activation="silu")
    assert not spec.fires_sparsely
    nothing = Bundle(tmp_path)
    ROUND_HARDWARE.save(nothing.hardware)
    found, notices = choose(nothing, spec=spec, strategy="dense")
    assert found.choice.uses_gpu and found.layer_on_gpu.all() and notices == []
    small = VramPlan(spec, CONTEXT, (0, 0)).workspace_bytes + 40_000
    assert planned(choose(nothing, small, spec=spec, strategy="dense")[0], spec) <= small
    assert not choose(nothing, gpu=None, spec=spec, strategy="dense")[0].choice.uses_gpu


def test_packed_weights_keep_their_order(bundle):
    order = np.random.default_rng(5).permuted(np.tile(np.arange(128, dtype=np.int32), (2, 1)), axis=1)
    weights = object.__new__(PackedModel)
    object.__setattr__(weights, "order", order)
    found = solve_within(bundle, folder_of(weights=weights), "exact", CONTEXT, GIB)
    assert (found.order == order).all() and found.choice.uses_gpu
    assert (solve_within(bundle, folder_of(), "exact", CONTEXT, GIB).order != order).any()


def test_missing_profiles_say_what_makes_them(tmp_path, free):
    store(Bundle(tmp_path), 2 * GIB)
    with pytest.raises(ArtifactError, match=r"profile\.safetensors is missing"):
        choose(Bundle(tmp_path, "hybrid prepare"), GIB)
