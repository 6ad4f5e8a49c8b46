"""Steps of many rows by the cost model: unions and times by hand, and what must hold for any model."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from placement_cases import NO_GPU, ROUND_HARDWARE, random_model, small_spec

from placement import Choice, CostModel, VramPlan
from placement.rows import RowsTime, dense_from
from profiler.common.errors import InputError

FIRING = np.array([[0.25, 1.0, 0.5]])
CPU = Choice.all_cpu(1)


def learned(hardware=NO_GPU, firing=FIRING, predictor_bytes=40):
    plan = VramPlan(small_spec(d_ff=firing.shape[1]), 8, (predictor_bytes,))
    return CostModel(plan, hardware, firing, "learned", predicted_ratio=1.6, group_size=1)


def test_a_union_is_read_once_by_hand():
    # Predicted for one of two rows: 0.64, 1, 0.96 of the neurons; fired: 0.4375, 1, 0.75. Rows of 16 bytes.
    found = RowsTime.of(learned(), CPU, 2)
    assert found.union_share == pytest.approx(2.6 / 3)
    read = 16 * 2.6 + 32 * 2.1875
    assert found.learned_seconds == pytest.approx(40 / 0.88e6 + 1e-4 + read / 1e6, rel=1e-5)  # and few products
    assert found.dense_seconds == pytest.approx(1e-4 + 144 / 1e6)


def test_each_row_is_multiplied_with_its_own_neurons_after_they_are_read_and_all_of_dense_meanwhile():
    slow = replace(NO_GPU, cpu_gemm_flops=1e6)
    found = RowsTime.of(learned(slow, predictor_bytes=0), CPU, 2)
    read = 16 * 2.6 + 32 * 2.1875
    assert found.learned_seconds == pytest.approx(1e-4 + read / 1e6 + 2 * 8 * (16 * 2.2 + 32 * 1.75) / 4 / 1e6)
    assert found.dense_seconds == pytest.approx(1e-4 + 2 * 8 * 144 / 4 / 1e6)
    assert RowsTime.of(learned(slow), CPU, 2).learned_seconds - found.learned_seconds == pytest.approx(2 * 8 * 40 / 1e6)


def test_one_row_is_what_it_was():
    model = learned(replace(NO_GPU, cpu_gemm_flops=1.0))
    assert RowsTime.of(model, CPU, 1).learned_seconds == model.ffn_seconds(CPU)
    time = model.evaluate(CPU)
    assert model.ffn_seconds(CPU) == time.predictor + time.ffn
    assert RowsTime.of(model, CPU, 1).union_share == pytest.approx(2.2 / 3)


def test_hand_offs_and_keys_grow_with_rows():
    model = CostModel(VramPlan(small_spec(), 8, (0,)), ROUND_HARDWARE, FIRING, "dense", rows=4)
    one = replace(model, rows=1)
    assert model.handoff_seconds - one.handoff_seconds == pytest.approx(3 * 32 / 1e6)
    assert model.evaluate(CPU).attention - one.evaluate(CPU).attention == pytest.approx(3 * 256 / 0.88e6)


@pytest.mark.parametrize("scale", [1e-4, 0.02, 0.1, 0.5])
def test_dense_from_is_where_the_lines_cross(scale):
    firing = scale * np.random.default_rng(0).random((1, 500))
    model = learned(replace(NO_GPU, cpu_scattered_bandwidth=6e5), firing)
    cheaper = [RowsTime.of(model, CPU, rows).dense_is_cheaper for rows in range(1, 33)]
    found = dense_from(model, CPU)
    assert (found is None) == (not cheaper[-1])
    assert cheaper == [found is not None and rows >= found for rows in range(1, 33)]
    assert {1e-4: None, 0.5: 3}.get(scale, found) == found


@pytest.mark.parametrize("seed", range(10))
def test_more_rows_never_cost_less_and_the_union_stays_a_share(seed):
    model = random_model(seed)
    model = replace(model, strategy="learned", hardware=replace(model.hardware, cpu_gemm_flops=1e8))
    choice = Choice(np.full(model.plan.spec.n_layers, 1), np.ones(model.plan.spec.n_layers, bool), True)
    times = [RowsTime.of(model, choice, rows) for rows in (1, 2, 4, 8, 16, 32)]
    for few, more in pairwise(times):
        assert few.union_share <= more.union_share <= 1
        assert few.dense_seconds <= more.dense_seconds * (1 + 1e-12)
        assert more.learned_seconds <= 2.1 * few.learned_seconds


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="rows at least 1"):
        replace(learned(), rows=0)
