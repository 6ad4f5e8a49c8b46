"""`hybrid bench` on two devices: bytes, prediction, memory and prefill's ways, what is printed of them and stored."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE
from model_cases import CASES, SHAPE, make_model
from placement_cases import ROUND_HARDWARE, small_spec
from step_cases import use_references

from hybrid import Engine, EngineConfig
from hybrid.bench.bench import Bench, BenchConfig
from hybrid.bench.ceiling import Firing, Machine, SplitBytes
from hybrid.bench.devices import (
    GpuFacts,
    GpuResult,
    PrefillWays,
    gpu_read_bandwidth,
    known_firing,
    measured_hardware,
    predicted_seconds,
)
from hybrid.bench.measurements import append_csv
from hybrid.bench.peers import GreedyRun
from hybrid.bench.report import PEER, BenchResult, csv_rows, json_line, report
from hybrid.formats.bundle import Bundle
from hybrid.model.ffn import FFNCounters
from placement import UNLIMITED, Placement, PlacementSettings, place
from placement.workspace import predictor_bytes
from predictor.bank import PredictorBank
from predictor.low_rank import LowRankPredictor

pytest.importorskip("transformers")
SETTING = {"date": "d", "commit": "c", "machine": "m", "model": "tiny", "dtype": "f32", "threads": 2}
FACTS = GpuFacts("Card", 1e12, 1e-5, Firing(), budget=2**30, free_before=None)


def steps(hot, cold):
    return SplitBytes(
        {"attention": 10**9}, {"attention": 0}, np.array([hot]), np.array([cold]), np.array([True]), head_handed=False
    )


def found(**changes):
    """Dense takes 1 + 2 ms at least, learned 1 + 0.51 ms."""
    return GpuResult(
        **{
            "facts": FACTS,
            "planned": 1000 * 2**20,
            "used": 900 * 2**20,
            "taken": 1010 * 2**20,
            "steps": {"dense": steps(2e9, 1e8), "learned": steps(1e8, 5e7)},
            "prefill": {"dense": PrefillWays(3, 2, 1), "learned": PrefillWays(0, 5, 1)},
            "predicted": {"learned": 1.8e-3},
            "promised": 480.0,
            "promised_for": "learned",
            "predicted_ttft": 0.4,
        }
        | changes
    )


def result(gpu, peer=False):
    run = GreedyRun(10, (1, 2, 3), 0.5, (0.004, 0.004))
    quick = GreedyRun(10, (1, 2, 9), 0.5, (0.002, 0.002))
    return BenchResult(
        runs={"dense": [run] * 3, "learned": [quick] * 3},
        bytes={name: step.parts for name, step in gpu.steps.items()},
        counters={
            "dense": FFNCounters(100, 100, ffn_seconds=0.018),
            "learned": FFNCounters(100, 20, 20, 15, ffn_seconds=0.0096),
        },
        bandwidths=[1e11] * 3,
        cores=[2.0] * 3,
        peer_runs=[run] * 3 if peer else [],
        gpu=gpu,
    )


def test_numbers_are_held_against_both_devices():
    summaries = result(found()).summaries
    dense, learned = summaries["dense"], summaries["learned"]
    assert dense.share_of_ceiling == pytest.approx(3.0 / 4.0) and dense.bytes_per_token == 3.1e9
    assert learned.share_of_ceiling == pytest.approx(1.51 / 2.0)
    assert (dense.hot_share, learned.hot_share, learned.active_share) == (None, 0.75, 0.2)
    assert dense.predicted_over_measured is None and learned.predicted_over_measured == pytest.approx(0.9)
    assert dense.predicted_ttft_over_measured == learned.predicted_ttft_over_measured == pytest.approx(0.8)
    unknown = result(found(predicted_ttft=None), peer=True).summaries
    assert unknown["dense"].predicted_ttft_over_measured is unknown[PEER].predicted_ttft_over_measured is None
    assert learned.milliseconds["attention"] is None and learned.milliseconds["step"] == pytest.approx(1.6)
    assert learned.milliseconds["rest"] == pytest.approx(0.4)


def test_the_report_says_what_is_known_and_a_dash_for_what_is_not():
    text = report(result(found()), SETTING, same_text=False)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Card: read bandwidth 1,000 GB/s, a hand-off takes 10.0 us" in lines
    for line in (
        "GPU hot neurons 2,000.0 100.0",
        "CPU cold neurons 100.0 50.0",
        "all 3,100.0 1,150.0",
        "hand-offs 1 1",
        "least ms 3.000 1.510",
        "ceiling, tok/s 333.3 662.3",
        "computed by the GPU - 75.0%",
        "predicted, ms - 1.80",
        "over measured - -10.0%",
        "at a full context, tok/s - 480.0",
        "TTFT predicted, ms 400.0 400.0",
        "over measured, first token -20.0% -20.0%",
        "prefill, layers streamed 3 0",
        "cold ones by the CPU 2 5",
        "whole ones by the CPU 1 1",
        "attention - - - -",
        "step 3.000 1033.3 1.600 718.8",
        "budget 1.00 GiB",
        "planned 1000.0 MiB",
        "tensors of the runtime 900.0 MiB",
        "taken by the process 1010.0 MiB (+1.0%)",
    ):
        assert line in lines, line
    unknown = report(result(found(taken=None, facts=replace(FACTS, budget=UNLIMITED))), SETTING, same_text=False)
    assert "not known" in unknown and "unlimited" in unknown


def test_json_and_csv_have_both_devices(tmp_path):
    line = json.loads(json_line(result(found(), peer=True), SETTING))
    assert line["gpu"]["predicted_ttft_seconds"] == 0.4
    assert line["results"]["dense"]["predicted_ttft_over_measured"] == pytest.approx(0.8)
    assert line["gpu"]["vram_taken"] == 1010 * 2**20 and line["gpu"]["prefill"]["dense"]["streamed"] == 3
    assert (
        line["results"]["learned"]["hot_share"] == 0.75 and line["results"]["learned"]["bytes"]["GPU attention"] == 1e9
    )
    assert line["results"][PEER]["milliseconds"] is None
    append_csv(tmp_path / "g.csv", csv_rows(result(found(), peer=True), SETTING))
    rows = list(csv.DictReader((tmp_path / "g.csv").read_text().splitlines()))
    learned, peer = rows[1], rows[2]
    assert float(learned["predicted_over_measured"]) == pytest.approx(0.9) and learned["prefill_computed"] == "5"
    assert float(learned["predicted_ttft_ms"]) == 400 and float(learned["predicted_ttft_over_measured"]) == 0.8
    assert peer["predicted_ttft_ms"] == peer["predicted_ttft_over_measured"] == ""
    assert float(learned["cpu_bytes_per_token"]) == 5e7 and learned["vram_planned"] == str(1000 * 2**20)
    assert peer["hot_share"] == peer["gpu_bytes_per_token"] == peer["predicted_seconds"] == ""


def test_rows_of_the_cpu_alone_keep_their_columns(request):
    kept = (request.config.rootpath / "scripts" / "results" / "decode.csv").read_text().splitlines()[0].split(",")
    alone = replace(result(found()), gpu=None)
    setting = SETTING | {"prompt_tokens": 1, "tokens": 2}
    assert list(csv_rows(alone, setting)[0]) == kept
    assert list(csv_rows(result(found()), setting)[0])[: len(kept)] == kept


def solved(strategy="learned", context=40, rank=9):
    """An engine, as far as a prediction sees it, whose placement was solved for the facts' machine."""
    spec = small_spec(n_layers=3, d_model=128, d_ff=256, vocab_size=500)
    firing = np.random.default_rng(0).random((3, 256)) ** 4
    sizes = (predictor_bytes(128, 256, rank) if strategy == "learned" else 0,) * 3
    hardware = replace(ROUND_HARDWARE, source="measured", cpu_read_bandwidth=1e8, gpu_read_bandwidth=1e9)
    settings = PlacementSettings(15 * 10**6, context, strategy, predicted_ratio=1.5, reserve=0, prefill_chunk=8)
    placement = place(spec, hardware, firing, sizes, settings).placement
    predictor = SimpleNamespace(b1=np.zeros(rank))
    engine = SimpleNamespace(
        model=SimpleNamespace(spec=spec, ffns=[SimpleNamespace(predictor=predictor)] * 3),
        placement=placement,
        context=context,
        runtime=SimpleNamespace(pool=SimpleNamespace(threads=1)),
    )
    return engine, replace(FACTS, firing=Firing(firing, 1.5), hardware=hardware)


@pytest.mark.parametrize("strategy", ["dense", "learned"])
def test_the_prediction_is_that_of_the_placement_at_the_runs_positions(strategy):
    engine, facts = solved(strategy)
    assert engine.placement.choice.uses_gpu
    promised = engine.placement.made_from["predicted_seconds_per_token"]
    assert predicted_seconds(engine, facts, strategy, 40.0) == pytest.approx(promised, rel=1e-9)
    assert predicted_seconds(engine, facts, strategy, 10.0) < promised


def test_a_placement_for_another_machine_predicts_nothing():
    engine, facts = solved()
    assert predicted_seconds(engine, replace(facts, hardware=None), "learned", 10.0) is None
    other = replace(facts, hardware=replace(facts.hardware, name="another"))
    assert predicted_seconds(engine, other, "learned", 10.0) is None
    engine.placement = Placement.all_hot(engine.model.spec)
    assert predicted_seconds(engine, facts, "learned", 10.0) is None


def test_only_a_measured_profile_of_this_gpu_counts(tmp_path):
    bundle = Bundle(tmp_path)
    assert measured_hardware(bundle, "Card") is None
    for source, name, known in (("measured", "Card, 2", True), ("default", "Card, 2", False), ("measured", "C", False)):
        replace(ROUND_HARDWARE, source=source, name=name).save(bundle.hardware)
        assert (measured_hardware(bundle, "Card") is not None) == known


def test_without_artefacts_nothing_is_known_of_what_fires(tmp_path):
    firing = known_firing(Bundle(tmp_path), small_spec())
    assert firing.frequency is None and firing.predicted_ratio == 1.0


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """One layer with hot and cold neurons, one on the CPU."""
    use_references(monkeypatch)
    CASES["bench"] = ("Llama", SHAPE | {"hidden_act": "relu", "num_hidden_layers": 2})
    folder = tmp_path
    make_model("bench", folder)
    del CASES["bench"]
    generator = torch.Generator().manual_seed(0)
    bank = PredictorBank(tuple(random_predictor(generator) for _ in range(2)))
    with Engine.load(folder, EngineConfig("exact", threads=1)) as alone:
        placement = Placement.random(alone.model.spec, 0.4, 0)
    placement.hot[1], placement.layer_on_gpu[1] = 0, False
    settings = EngineConfig("learned", threads=1, context=16)
    with Engine.load(folder, settings, placement, bank, torch.device(DEVICE)) as made:
        yield made


def random_predictor(generator, rank=5):
    d, f = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    codes = [torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in ((rank, d), (f, rank))]
    return LowRankPredictor(
        codes[0], torch.full((rank,), 1e-3), torch.ones(rank), codes[1], torch.full((f,), 1e-3), torch.zeros(f)
    )


def test_an_engine_on_two_devices_is_measured(engine):
    config = BenchConfig(("learned",), prompt_tokens=1, tokens=2, runs=1)
    with pytest.raises(ValueError, match="give `gpu`"):
        Bench(engine, config, probe_bytes=2**16)
    measured = Bench(engine, config, probe_bytes=2**16, gpu=FACTS).run(lambda count: None)
    counters, gpu = measured.counters["learned"], measured.gpu
    assert counters.neurons == 2 * 85 and 0 < counters.fired_hot < counters.computed < counters.neurons
    assert gpu.used == engine.runner.arena.used <= gpu.planned and gpu.taken is None
    assert gpu.steps["learned"].handoffs == 2 and gpu.prefill["learned"] == PrefillWays()
    assert gpu.steps["learned"].seconds(Machine(1e12, 1e10, 1e-5)) > 2e-5
    text = report(measured, SETTING, same_text=False)
    assert "Card: read bandwidth" in text and "GPU hot neurons" in text
    assert json.loads(json_line(measured, SETTING))["gpu"]["vram_tensors"] == gpu.used


@pytest.mark.parametrize("tokens", [8, 9])
def test_a_prompt_that_prefill_reads_is_predicted_where_the_machine_was_measured(engine, tokens):
    config = BenchConfig(("learned",), prompt_tokens=tokens, tokens=2, runs=1)
    facts = replace(FACTS, hardware=ROUND_HARDWARE)
    measured = Bench(engine, config, probe_bytes=2**16, gpu=facts).run(lambda count: None)
    expected = engine.runner.expected_seconds(tokens)
    assert measured.gpu.predicted_ttft == expected and (expected is None) == (tokens == 8)
    assert "TTFT predicted, ms" in report(measured, SETTING, same_text=False)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_gpus_bandwidth_is_measured_and_nothing_is_kept():
    before = torch.cuda.memory_reserved()
    assert gpu_read_bandwidth(torch.device(DEVICE), 2**26) > 0
    assert torch.cuda.memory_reserved() <= before
