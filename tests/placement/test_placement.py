"""The placement artefact, and `place` from frequencies to a file."""

from dataclasses import replace

import numpy as np
import pytest
from artifact_cases import write_version_1
from placement_cases import NO_GPU, ROUND_HARDWARE, small_spec

from placement import UNLIMITED, Placement, PlacementSettings, place
from profiler.common.artifact import ArtifactHeader, write_tensors
from profiler.common.errors import ArtifactError, ArtifactMismatchError, BudgetError, ContextError, InputError

SPEC = small_spec(n_layers=3, d_model=64, d_ff=17, vocab_size=50)
FIRING = np.random.default_rng(0).random((3, 17)) ** 3
HARDWARE = replace(ROUND_HARDWARE, handoff_seconds=1e-6)


def place_small(budget, solver="milp", hardware=HARDWARE, **changes):
    settings = PlacementSettings(budget, context=8, solver=solver, group_size=4, prefill_chunk=1, reserve=0, **changes)
    return place(SPEC, hardware, FIRING, (0, 100, 0), settings, {"profile": "abc"})


def same(left, right):
    arrays = ("order", "hot", "zero_copy", "layer_on_gpu")
    equal = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)
    return equal and (left.head_on_gpu, left.made_from) == (right.head_on_gpu, right.made_from)


@pytest.mark.parametrize("make", [Placement.all_hot, Placement.all_cold, lambda spec: Placement.random(spec, 0.3, 1)])
def test_round_trip(tmp_path, make):
    placement = make(SPEC)
    placement.save(tmp_path / "placement.safetensors")
    assert same(Placement.load(tmp_path / "placement.safetensors", SPEC), placement)


def test_constructors():
    hot, cold, some = Placement.all_hot(SPEC), Placement.all_cold(SPEC), Placement.random(SPEC, 0.3, seed=1)
    assert hot.hot[2] == 17 and hot.head_on_gpu
    assert cold.hot[2] == 0 and not cold.choice.uses_gpu
    assert (some.hot == 5).all()
    both = some.order[1]
    np.testing.assert_array_equal(np.sort(both), np.arange(17))
    assert same(some, Placement.random(SPEC, 0.3, seed=1))
    assert not np.array_equal(some.order, Placement.random(SPEC, 0.3, seed=2).order)


def test_hot_firing_share_by_hand():
    order = np.array([[2, 0, 1], [1, 0, 2]], dtype=np.int32)
    placement = Placement(order, np.array([1, 2], dtype=np.int32), np.ones(2, dtype=bool), True, "small")
    firing = np.array([[0.1, 0.2, 0.5], [0.4, 0.6, 0.2]])
    assert placement.hot_firing_share(firing) == pytest.approx((0.5 + 0.6 + 0.4) / 2.0)
    assert placement.hot_firing_share(np.zeros((2, 3))) == 0.0


def corrupt_tensors(**changes):
    placement = Placement.random(SPEC, 0.5, 0)
    tensors = {
        "order": placement.order.copy(),
        "hot": placement.hot.copy(),
        "zero_copy": np.array([9, 0, 1], np.int32),
        "layer_on_gpu": placement.layer_on_gpu.copy(),
        "head_on_gpu": np.array([True]),
    }
    return {name: value for name, value in (tensors | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"order": np.zeros((3, 17), np.int32)}, "permutation"),
        ({"order": np.tile(np.arange(1, 18, dtype=np.int32), (3, 1))}, "permutation"),
        ({"order": np.tile(np.arange(17, dtype=np.int64), (3, 1))}, "tensors"),
        ({"order": np.tile(np.arange(16, dtype=np.int32), (3, 1))}, "tensors"),
        ({"hot": np.array([0, 18, 0], np.int32)}, r"0\.\.17"),
        ({"hot": np.array([0, -1, 0], np.int32)}, r"0\.\.17"),
        ({"hot": np.array([0, 1], np.int32)}, "tensors"),
        ({"zero_copy": np.array([0, 10, 0], np.int32)}, "zero-copy neurons is not in 0 to its cold ones"),
        ({"zero_copy": np.array([0, 0, -1], np.int32)}, "zero-copy neurons is not in 0 to its cold ones"),
        ({"zero_copy": np.zeros(3, np.int64)}, "tensors"),
        ({"zero_copy": None}, "tensors"),
        ({"layer_on_gpu": np.array([True, False, True])}, "on the CPU has hot or zero-copy neurons"),
        (
            {"layer_on_gpu": np.array([True, True, False]), "hot": np.array([5, 5, 0], np.int32)},
            "on the CPU has hot or zero-copy neurons",
        ),
        ({"head_on_gpu": None}, "tensors"),
        ({"extra": np.zeros(1)}, "tensors"),
    ],
)
def test_corrupt_artefact_is_refused(tmp_path, changes, reason):
    path = tmp_path / "placement.safetensors"
    write_tensors(path, ArtifactHeader("placement", SPEC.fingerprint), corrupt_tensors(**changes))
    with pytest.raises(ArtifactError, match=reason) as caught:
        Placement.load(path, SPEC)
    assert "hybrid place" in str(caught.value) and "\n" not in str(caught.value)


def test_zero_copy_neurons_steer_from_a_tensor_and_not_from_what_the_artefact_was_made_from(tmp_path):
    hardware = replace(HARDWARE, pcie_bandwidth=9e5, gpu_read_bandwidth=1e9)
    settings = PlacementSettings(360_000, 8, "learned", group_size=4, prefill_chunk=1, reserve=0)
    made = place(SPEC, hardware, FIRING, (0, 100, 0), settings).placement
    assert made.zero_copy.dtype == np.int32 and made.zero_copy.any() and "zero_copy" not in made.made_from
    made.save(tmp_path / "placement.safetensors")
    assert same(Placement.load(tmp_path / "placement.safetensors", SPEC), made)
    assert Placement.all_hot(SPEC).zero_copy.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("noted", "read"), [([3, 0, 9], [3, 0, 9]), ([], [0, 0, 0]), (None, [0, 0, 0]), ([1.5, "x", 0], [0, 0, 0])]
)
def test_version_1_notes_them_in_what_it_was_made_from(tmp_path, noted, read):
    path, tensors = tmp_path / "placement.safetensors", corrupt_tensors(zero_copy=None)
    made_from = {"solver": "milp"} | ({} if noted is None else {"zero_copy": noted})
    write_version_1(path, ArtifactHeader("placement", SPEC.fingerprint, made_from), tensors)
    found = Placement.load(path, SPEC)
    assert found.zero_copy.tolist() == read and found.made_from == {"solver": "milp"}
    write_version_1(path, ArtifactHeader("placement", SPEC.fingerprint, {"zero_copy": [0, 10, 0]}), tensors)
    with pytest.raises(ArtifactError, match="zero-copy neurons is not in 0"):
        Placement.load(path, SPEC)


def test_artefact_of_another_model_or_missing(tmp_path):
    path = tmp_path / "placement.safetensors"
    with pytest.raises(ArtifactError, match="hybrid place"):
        Placement.load(path, SPEC)
    Placement.all_hot(SPEC).save(path)
    with pytest.raises(ArtifactMismatchError, match="other"):
        Placement.load(path, replace(SPEC, fingerprint="other"))


@pytest.mark.parametrize("solver", ["milp", "greedy"])
@pytest.mark.parametrize("budget", [0, 1, 335_872, 345_000, 360_000, 380_000, UNLIMITED])
def test_place_keeps_the_budget_and_the_artefact_says_how(tmp_path, solver, budget):
    result = place_small(budget, solver)
    assert sum(size for _, size in result.rows) <= budget
    result.placement.save(tmp_path / "placement.safetensors")
    loaded = Placement.load(tmp_path / "placement.safetensors", SPEC)
    assert same(loaded, result.placement)
    recorded = {"vram_budget": budget, "context": 8, "strategy": "exact", "solver": solver, "profile": "abc"}
    assert recorded.items() <= loaded.made_from.items()
    assert loaded.made_from["predicted_tokens_per_second"] == pytest.approx(1 / result.solution.seconds)
    assert result.solution.seconds >= place_small(budget).solution.seconds


def test_more_budget_serves_more_firings_hot():
    everything = sum(size for _, size in place_small(UNLIMITED).rows)
    # 17 neurons of 3 x 64 x 4 bytes in each of 3 layers: half of them do not fit the third budget.
    budgets = (0, everything - 3 * 17 * 768, everything - 20_000, UNLIMITED)
    shares = [place_small(budget).placement.hot_firing_share(FIRING) for budget in budgets]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert 0 < shares[2] < 1


@pytest.mark.parametrize("solver", ["milp", "greedy"])
def test_place_on_a_machine_without_a_gpu(solver):
    for budget in (0, UNLIMITED):
        assert not place_small(budget, solver, hardware=NO_GPU).placement.choice.uses_gpu
    with pytest.raises(BudgetError, match="round numbers"):
        place_small(1, solver, hardware=NO_GPU)


def test_unlimited_stops_at_the_memory_of_the_gpu():
    hardware = replace(HARDWARE, vram_bytes=360_000)
    assert 0 < sum(size for _, size in place_small(UNLIMITED, hardware=hardware).rows) <= 360_000
    with pytest.raises(BudgetError, match="360000"):
        place_small(360_001, hardware=hardware)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vram_budget": -1}, BudgetError),
        ({"vram_budget": UNLIMITED + 1}, BudgetError),
        ({"solver": "best"}, InputError),
        ({"time_limit": 0.0}, InputError),
        ({"time_limit": float("nan")}, InputError),
        ({"context": 65}, ContextError),
        ({"strategy": "oracle"}, InputError),
    ],
)
def test_settings_that_make_no_sense(changes, error):
    with pytest.raises(error):
        place(SPEC, HARDWARE, FIRING, (0, 0, 0), replace(PlacementSettings(0, context=8), **changes))
