"""`hybrid bench --ablation`: its rows, their placements within one budget, what is printed, and what is refused."""

import csv
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_cases import make_model
from packed_cases import pack
from placement_cases import small_spec

from hybrid.bench.ablation import (
    PREDICTORS,
    RANDOM,
    SOLVED,
    WHOLE,
    Ablation,
    ablation_budget,
    ablation_csv,
    ablation_json,
    ablation_report,
    bank_plan,
    require_free_order,
)
from hybrid.bench.bench import BenchConfig
from hybrid.bench.ceiling import Firing, SplitBytes
from hybrid.bench.devices import GpuFacts, GpuResult
from hybrid.bench.measurements import append_csv
from hybrid.bench.peers import GreedyRun
from hybrid.bench.report import BenchResult
from hybrid.cli import main
from hybrid.errors import BudgetError, InputError
from hybrid.model.ffn import FFNCounters
from hybrid.model.loader import ModelFolder
from placement.placement import Placement
from placement.plan import VramPlan

SPEC = small_spec(n_layers=4, d_model=128, d_ff=300, vocab_size=700)
PLAN = VramPlan(SPEC, 40, (600,) * 4, prefill_chunk=8, reserve=0)
# Neurons fire the more seldom the higher their number.
FACTS = GpuFacts("Card", 1e12, 1e-5, Firing(np.tile(np.linspace(1, 0, 300), (4, 1))))
OPTIONS = {"sparsity": None, "peer": None, "peer_model": None, "vram_budget": "1GiB"}
SETTING = {"machine": "m", "model": "tiny", "dtype": "f32", "threads": 2, "prompt_tokens": 9, "tokens": 4}
SECONDS = {WHOLE: 0.08, PREDICTORS: 0.05, RANDOM: 0.02, SOLVED: 0.01}


def budget(layers=2):
    """Bytes of two whole layers and something."""
    choice = Placement.all_hot(SPEC).choice
    on_gpu = np.arange(4) < layers
    return PLAN.total_bytes(type(choice)(np.where(on_gpu, 300, 0), on_gpu, False)) + 5000


class FakeBench:
    """In the place of `Bench`: runs whose speed and tokens follow from the placement."""

    def __init__(self, engine, config, probe_bytes, gpu):
        self.engine, self.config = engine, config
        assert gpu is FACTS and probe_bytes == 64

    def run(self, advance):
        runs, counters, steps = {}, {}, {}
        none = np.zeros(4)
        for strategy in self.config.strategies:
            name = {"dense": WHOLE}.get(strategy, self.engine.name)
            last = 5 if name == SOLVED else 3
            runs[strategy] = [GreedyRun(9, (1, 2, 3, last), 0.5, (SECONDS[name],) * 3)] * self.config.runs
            counters[strategy] = FFNCounters(100, 40, 40, 30) if strategy == "learned" else FFNCounters(100, 100)
            steps[strategy] = SplitBytes({"attention": 10**9}, {}, none, none, none > 0, False)
            advance(self.config.runs)
        planned = PLAN.total_bytes(self.engine.placement.choice)
        gpu = GpuResult(FACTS, planned, planned, planned + 10, steps, {}, {}, None, None)
        parts = {name: step.parts for name, step in steps.items()}
        return BenchResult(runs, parts, counters, [1e11], [2.0], gpu=gpu)


@pytest.fixture
def measured(monkeypatch):
    """Rows of fake engines, the placements that were loaded, and what happened in which order."""
    monkeypatch.setattr("hybrid.bench.ablation.Bench", FakeBench)
    monkeypatch.setattr("hybrid.bench.ablation.free_gpu", lambda: events.append("free"))
    names, events, placements, turns = iter((PREDICTORS, RANDOM, SOLVED)), [], [], []

    @contextmanager
    def load(placement):
        events.append("load")
        placements.append(placement)
        yield SimpleNamespace(placement=placement or Placement.all_hot(SPEC), name=next(names))
        events.append("close")

    runner = Ablation(load, PLAN, budget(), BenchConfig((), 9, 4, runs=3), FACTS)
    rows = runner.run(turns.append, probe_bytes=64)
    assert sum(turns) == runner.turns == 12
    return rows, placements, events


def test_placements_share_one_budget_and_are_loaded_one_after_another(measured):
    rows, (whole, drawn, solved), events = measured
    assert events == ["load", "close", "free"] * 3
    assert solved is None and whole.hot.tolist() == [300, 300, 0, 0] and whole.layer_on_gpu.sum() == 2
    assert drawn.layer_on_gpu.all() and drawn.hot.max() - drawn.hot.min() <= 1
    assert all(budget() - 10_000 < PLAN.total_bytes(each.choice) <= budget() for each in (whole, drawn))
    assert [row.name for row in rows] == [WHOLE, PREDICTORS, RANDOM, SOLVED]


def test_rows_say_what_each_is_worth(measured):
    whole, predictors, drawn, solved = measured[0]
    assert [round(row.speed.p50, 3) for row in measured[0]] == [12.5, 20, 50, 100]
    assert (whole.hot_share, predictors.hot_share) == (None, 0.75)
    assert whole.expected_hot_share == predictors.expected_hot_share == pytest.approx(0.5)
    assert solved.expected_hot_share == pytest.approx(1.0)
    expected = drawn.hot_neurons / 1200
    assert drawn.expected_hot_share == pytest.approx(expected, abs=0.1)
    assert (whole.agreement, drawn.agreement, solved.agreement) == (1, 1, 0.75)
    assert whole.share_of_ceiling == pytest.approx(1e-3 / 0.08)


def test_the_table_the_csv_and_the_json(measured, tmp_path):
    rows = measured[0]
    text = ablation_report(rows, SETTING, 2**30, "Card")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:2] == ["tiny, f32, 2 threads of m, Card", "1.00 GiB of GPU memory, 9 + 4 tokens"]
    assert f"{WHOLE} 12.5 12.5 to 12.5 1.00 1.2% - 50.0% 100.0%" in lines
    assert f"{SOLVED} 100.0 100.0 to 100.0 8.00 10.0% 75.0% 100.0% 75.0%" in lines
    assert any(line.startswith(f"{WHOLE} 2 600 CPU") for line in lines)
    assert lines[-1] == "solver over random: 2.00"
    found = json.loads(ablation_json(rows, SETTING, 2**30, FACTS))
    assert found["solver_over_random"] == pytest.approx(2) and found["rows"][3]["agreement"] == 0.75
    append_csv(tmp_path / "a.csv", ablation_csv(rows, SETTING, 2**30, "Card"))
    stored = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["case"] for row in stored] == [WHOLE, PREDICTORS, RANDOM, SOLVED]
    assert float(stored[2]["tokens_per_second_p50"]) == pytest.approx(50) and stored[0]["hot_share"] == ""


def test_the_plan_has_the_predictors():
    bank = SimpleNamespace(predictors=[SimpleNamespace(rank=rank) for rank in (3, 3, 0, 7)])
    plan = bank_plan(SPEC, None, bank)
    assert plan.context == SPEC.max_context and plan.predictor_bytes[2] == 0
    assert plan.predictor_bytes[3] > plan.predictor_bytes[0] == plan.predictor_bytes[1] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": "dense"}, InputError, "leave --sparsity out"),
        ({"peer_model": "m.gguf"}, InputError, "leave --peer-model out"),
        ({"vram_budget": None}, BudgetError, "give one such as --vram-budget 8GiB"),
        ({"vram_budget": "unlimited"}, BudgetError, "within a budget"),
        ({"vram_budget": "0"}, BudgetError, "within a budget"),
    ],
)
def test_options_without_meaning_are_refused(monkeypatch, options, error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ablation_budget(OPTIONS) == 2**30
    with pytest.raises(error, match=message):
        ablation_budget(OPTIONS | options)


def test_without_a_gpu_it_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--ablation", "--vram-budget", "8GiB"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "--ablation compares placements on a GPU, and there is none here" in error


def test_models_that_cannot_be_compared_are_refused(tmp_path):
    pytest.importorskip("transformers")
    make_model("llama-relu", tmp_path / "relu")
    make_model("mistral-full", tmp_path / "silu")
    pack(tmp_path / "relu", tmp_path / "packed", "bf16")
    require_free_order(ModelFolder.open(tmp_path / "relu"))
    with pytest.raises(InputError, match="give the model that it was packed from"):
        require_free_order(ModelFolder.open(tmp_path / "packed"))
    with pytest.raises(InputError, match="silu fires densely"):
        require_free_order(ModelFolder.open(tmp_path / "silu"))
