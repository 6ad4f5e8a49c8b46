"""The ceiling on two devices: bytes on each, by layer, and the least time that they take."""

from types import SimpleNamespace

import numpy as np
import pytest

from hybrid.bench.ceiling import Firing, Machine, SplitBytes, bytes_per_token, split_bytes
from hybrid.model.ffn import FFNCounters
from placement.placement import Placement

LAYERS, NEURONS, ROW = 3, 8, 10
# Neurons of layer 0 fire in this order; those of layer 1 always, those of layer 2 never.
FREQUENCY = np.array([np.arange(8) / 8, np.ones(8), np.zeros(8)])


def matrix(rows, row_bytes=ROW):
    return SimpleNamespace(nbytes=rows * row_bytes, row_bytes=row_bytes)


def model():
    def block(window):
        linear = SimpleNamespace(matrix=matrix(3)), SimpleNamespace(matrix=matrix(2))
        return SimpleNamespace(attention=SimpleNamespace(window=window, qkv=linear[0], out=linear[1]))

    ffn = SimpleNamespace(up=matrix(NEURONS), predictor=SimpleNamespace(nbytes=7))
    spec = SimpleNamespace(
        n_layers=LAYERS, d_ff=NEURONS, d_model=4, rows_per_neuron=3, norm="rms", kv_bytes_per_layer=lambda n: 2 * n
    )  # fmt: skip
    head = SimpleNamespace(matrix=matrix(40))
    return SimpleNamespace(
        spec=spec, blocks=[block(5), block(None), block(None)], ffns=[ffn] * 3, head=head, embedding=matrix(1)
    )


def placed(hot=(5, 8, 0), on_gpu=(True, True, False), head=True):
    order = np.tile(np.arange(NEURONS - 1, -1, -1, dtype=np.int32), (LAYERS, 1))
    return Placement(order, np.array(hot, np.int32), np.array(on_gpu), head, "f")


def split(strategy, placement=None, counters=None, firing=None):
    return split_bytes(
        model(), placement or placed(), strategy, counters or FFNCounters(), firing or Firing(FREQUENCY), 20.0
    )


def test_dense_parts_are_where_the_placement_puts_them():
    step = split("learned")
    assert step.gpu == {"attention": 100, "keys and values": 10 + 40, "predictor": 14, "head": 400}
    assert step.cpu == {"attention": 50, "keys and values": 40, "predictor": 7, "head": 0}
    assert step.handed.tolist() == [True, False, True] and not step.head_handed and step.handoffs == 2
    other = split("dense", placed(head=False))
    assert (other.gpu["head"], other.cpu["head"], other.gpu["predictor"], other.handoffs) == (0, 400, 0, 3)


def test_dense_reads_every_row_on_its_side():
    step = split("dense")
    assert step.hot.tolist() == [3 * 5 * ROW, 3 * 8 * ROW, 0] and step.cold.tolist() == [3 * 3 * ROW, 0, 3 * 8 * ROW]


def test_exact_reads_all_gates_and_the_rest_of_what_fires():
    step = split("exact")
    hot = 7 + 6 + 5 + 4 + 3  # eighths, of the 5 that fire most
    assert step.hot.tolist() == pytest.approx([ROW * (5 + 2 * hot / 8), ROW * 3 * 8, 0])
    assert step.cold.tolist() == pytest.approx([ROW * (3 + 2 * 3 / 8), 0, ROW * 8])
    assert split("exact", firing=Firing()).hot.tolist() == [50, 80, 0]  # at least


def test_learned_divides_what_was_counted_among_layers():
    counters = FFNCounters(neurons=2 * LAYERS * NEURONS, computed=34, fired=34, fired_hot=30)  # of two tokens
    step = split("learned", counters=counters, firing=Firing(FREQUENCY, predicted_ratio=2.0))
    rows = 1 + 2 / 2.0
    assert step.hot.sum() == pytest.approx(15 * ROW * rows) and step.cold.sum() == pytest.approx(2 * ROW * rows)
    assert step.hot.tolist() == pytest.approx([15 * 25 / (25 + 64) * ROW * rows, 15 * 64 / (25 + 64) * ROW * rows, 0])
    plain = split("learned", counters=counters, firing=Firing())
    assert plain.hot.tolist() == pytest.approx([15 * 5 / 13 * ROW * 3, 15 * 8 / 13 * ROW * 3, 0])
    assert plain.cold.tolist() == pytest.approx([2 * 3 / 11 * ROW * 3, 0, 2 * 8 / 11 * ROW * 3])


def test_the_least_time_takes_the_slower_side_of_each_layer():
    machine = Machine(gpu_bandwidth=1000.0, host_bandwidth=10.0, handoff_seconds=0.5)
    step = SplitBytes(
        {"attention": 200, "head": 100},
        {"attention": 30, "head": 0},
        hot=np.array([4000.0, 100.0, 50.0, 0.0]),
        cold=np.array([10.0, 10.0, 0.0, 20.0]),
        handed=np.array([True, True, False, True]),
        head_handed=False,
    )
    layers = max(4.0, 0.5 + 1.0) + max(0.1, 0.5 + 1.0) + 0.05 + (0.5 + 2.0)
    assert step.seconds(machine) == pytest.approx(layers + 0.3 + 3.0)
    assert (step.gpu_bytes, step.cpu_bytes, step.handoffs) == (4450, 70, 3)
    assert list(step.parts) == [
        "GPU attention", "GPU head", "GPU hot neurons", "CPU attention", "CPU head", "CPU cold neurons"
    ]  # fmt: skip
    assert sum(step.parts.values()) == 4520


def test_a_head_on_the_cpu_is_a_hand_off_of_its_own():
    none = np.zeros(1)
    step = SplitBytes({"head": 0}, {"head": 20}, none, none, np.array([False]), head_handed=True)
    assert step.seconds(Machine(1000.0, 10.0, 0.5)) == pytest.approx(2.5)


def test_all_bytes_are_on_one_side_or_the_other():
    counters = FFNCounters(neurons=LAYERS * NEURONS, computed=LAYERS * NEURONS, fired=LAYERS * NEURONS)
    together = bytes_per_token(model(), "dense", counters, 20.0)
    step = split("dense")
    assert step.gpu_bytes + step.cpu_bytes == sum(together.values()) - together["norms, embedding"]
