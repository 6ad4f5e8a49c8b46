"""`bench_gpu.py`: what it refuses, what it runs again, and the report of results."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from hybrid.errors import InputError

GIB = 2**30
STAGES = [
    "handoff",
    "kernels",
    "tokens",
    "certified",
    "budgets",
    "int4",
    "13b",
    "ablation",
    "prefill",
    "latency",
    "predicted",
]


@pytest.fixture
def script(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import bench_gpu

    return bench_gpu


@pytest.fixture
def reporter(script):
    import bench_gpu_report

    return bench_gpu_report


def decode(speed, ceiling, predicted, planned, tokens=(5, 6, 7)):
    return {
        "speed": speed,
        "tpot_p50": 1 / speed,
        "tpot_p90": 1.1 / speed,
        "tpot_p99": 1.5 / speed,
        "ceiling": ceiling,
        "share": speed / ceiling,
        "predicted": predicted,
        "error": speed / predicted - 1,
        "cpu_bytes": 3.6e8,
        "gpu_bytes": 5e9,
        "cpu_rate": 1.2e11,
        "gpu_rate": 3e12,
        "planned": planned,
        "arena": planned,
        "taken": round(0.99 * planned),
        "hot_share": 0.6,
        "hot_neurons": 0.25,
        "layers_on_gpu": 32,
        "tokens": list(tokens),
    }


CANNED = {
    ("handoff", "mailbox"): {"empty": 1.1e-5, "full": 5e-5, "active": 200, "threads": 15},
    ("kernels", "all"): {
        "kernels": [{"case": "gemv bf16 <out>", "microseconds": 12.5, "gigabytes": 2700.0, "share": 0.9}]
    },
    ("tokens", "shipped model, int4"): {
        "engines": 14,
        "as_cpu": 13,
        "as_dense": 14,
        "differing": ["exact, everything, 15 workers"],
        "tokens": 32,
        "threads": [1, 4],
        "strategies": ["dense", "exact"],
    },
    ("budgets", "0 GiB"): decode(17.0, 18.0, 17.5, 0),
    ("budgets", "8 GiB"): decode(155.0, 190.0, 161.0, 8 * GIB),
    ("budgets", "all"): decode(300.0, 340.0, 310.0, 14 * GIB, tokens=(5, 6, 7, 8)),
    ("ablation", "dense, all on the GPU"): decode(110.0, 130.0, 120.0, 14 * GIB),
    ("ablation", "hybrid bench --ablation"): {"text": "whole layers 20\nsolver 155", "solver_over_random": 1.5},
    ("prefill", "8 GiB"): {
        "rows": [
            {"length": 512, "way": way, "seconds": seconds, "streamed": 32, "computed": 0, "on_cpu": 0}
            for way, seconds in (("chosen", 0.5), ("stream", 0.5), ("cpu", 2.0))
        ]
    },
    ("prefill", "2 GiB"): {
        "rows": [
            {
                "length": length,
                "way": "chosen",
                "seconds": 0.5,
                "streamed": 32,
                "computed": 20,
                "on_cpu": 3,
                "split": 20,
                "predicted": predicted,
                "error": predicted / 0.5 - 1,
            }
            for length, predicted in ((64, 0.55), (512, 0.7))
        ]
    },
    ("predicted", "7b"): {"rows": [{"budget": g * GIB, "speed": 10.0 * g} for g in (1, 6, 8, 40)]},
    ("13b", "10 GiB"): {"failed": "took longer than 240 s"},
}


@pytest.fixture
def canned(tmp_path):
    path = tmp_path / "results.jsonl"
    about = {"date": "2026-01-01", "commit": "abc", "machine": "a CPU", "seconds": 3.0}
    lines = [{"stage": stage, "case": case} | about | found for (stage, case), found in CANNED.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def called(request, *arguments):
    path = request.config.rootpath / "scripts" / "bench_gpu.py"
    return subprocess.run([sys.executable, path, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(request, tmp_path):
    ran = called(request, "--out", tmp_path / "r.jsonl", "--models", tmp_path / "m")
    assert ran.returncode == 2
    assert ran.stderr == "error: the hybrid runtime is measured on a CUDA GPU, and none was found\n"


def test_unknown_stages_and_a_report_of_nothing(request, script, tmp_path):
    import click

    with pytest.raises(click.BadParameter, match="unknown stage nonsense; known are handoff, kernels, tokens"):
        script.chosen_stages("handoff,nonsense")
    assert script.chosen_stages(None)[:2] == ["handoff", "kernels"]
    ran = called(request, "--out", tmp_path / "r.jsonl", "--report")
    assert ran.returncode == 2 and ran.stderr.endswith("has no results; run without --report first\n")


def test_stages_and_cases_have_names_of_their_own(script):
    runs = list(script.all_runs())
    assert len({(run.stage, run.case) for run in runs}) == len(runs)
    assert sorted(script.STAGES) == sorted(STAGES)


def test_a_run_goes_on_and_a_failure_is_one_line(script, tmp_path, monkeypatch, capsys):
    def python(code):
        return (sys.executable, "-c", code)

    runs = [
        script.Run("a", "fine", python("print('above'); print('{\"speed\": 2.0}')")),
        script.Run("a", "broken", python("raise ValueError('so\\nit is')")),
        script.Run("a", "slow", python("import time; time.sleep(60)"), limit=1),
        script.Run("a", "silent", python("")),
        script.Run("b", "other", python("print('{}')")),
    ]
    monkeypatch.setattr(script, "all_runs", lambda: iter(runs))
    out = tmp_path / "r.jsonl"
    bench = script.Bench(out, tmp_path / "m", script.time.monotonic() + 100)
    assert bench.run(["a"]) == 3
    found = script.read_results(out)
    assert found["a", "fine"]["speed"] == 2.0 and found["a", "fine"]["text"] == "above"
    assert found["a", "broken"]["failed"] == "it is"
    assert found["a", "slow"]["failed"] == "took longer than 1 s"
    assert found["a", "silent"]["failed"].startswith("expected a JSON object")
    assert len(capsys.readouterr().out.splitlines()) == 4
    runs[1] = script.Run("a", "broken", python("print('{}')"))
    ended = script.Bench(out, tmp_path / "m", 0.0)
    assert ended.run(["a"]) == 3 and script.read_results(out)["a", "broken"]["failed"] == "no time is left"
    assert len(out.read_text().splitlines()) == 7  # what was fine was not run again


def test_only_what_was_made_is_removed(script, tmp_path):
    for name in ("7b", "7b-int4", "mine"):
        (tmp_path / name).mkdir()
    script.remove_models(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_results_that_are_none_are_refused(reporter, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"stage": "a", "case": "b"}\n[]\n')
    with pytest.raises(InputError, match="line 2 is not a result"):
        reporter.read_results(path)


def test_a_failure_does_not_replace_what_was_measured(reporter, tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [{"speed": 1}, {"failed": "x"}, {"speed": 2}, {"failed": "y"}]
    path.write_text("".join(json.dumps({"stage": "a", "case": "b"} | line) + "\n" for line in lines))
    assert reporter.read_results(path)["a", "b"]["speed"] == 2


def test_bars(reporter, canned):
    met = {what: fine for what, _, _, fine in reporter.bars(reporter.read_results(canned))}
    assert met["hand-off, empty"] and not met["hand-off, 200 neurons"]
    assert not met["same tokens, shipped model, int4"]
    assert met["7B at 8 GiB"] and met["7B at 8 GiB, share of the ceiling"] and met["solver over random"]
    assert met["all on the GPU, share of the ceiling"] and met["first 3 tokens over 3 budgets"]
    assert met["predicted first token, 2 GiB, 64"] and not met["predicted first token, 2 GiB, 512"]
    assert met["predicted time, 8 GiB"] and met["memory taken, budgets 8 GiB"] and met["prefill of 512"]


def test_report_csv_and_plot(request, canned, tmp_path):
    results = tmp_path / "results"
    ran = called(request, "--out", canned, "--report", "--results", results)
    assert ran.returncode == 0, ran.stderr
    for expected in (
        "| budgets | 8 GiB | 155.0 | 6.45 / 7.10 / 9.68 |",
        "NOT MET",
        "solver 155",
        "took longer",
        "6 GiB",
        "| 2 GiB | 512 | chosen | 0.500 | 0.700 | +40.0% | 1,024 | 12 / 20 / 0 / 3 |",
        "| 8 GiB | 512 | cpu | 2.000 | - | - | 256 | 32 / 0 / 0 / 0 |",
    ):
        assert expected in ran.stdout
    tables = [block for block in ran.stdout.split("\n\n") if block.startswith("|")]
    assert len(tables) == 8
    assert all(len({line.count(" | ") for line in block.strip().splitlines()}) == 1 for block in tables)
    rows = (results / "gpu_budgets.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("date,commit,machine,stage,case,speed,")
    again = called(request, "--out", canned, "--report", "--results", results)
    assert again.returncode == 0 and (results / "gpu_budgets.csv").read_text().splitlines() == rows


def test_plot_is_well_formed_and_in_its_frame(reporter, canned):
    lines = reporter.curves(reporter.read_results(canned))
    assert lines["measured"] == [(0.0, 17.0), (8.0, 155.0), (14.0, 300.0)]
    assert [gib for gib, _ in lines["predicted"]] == [0, 1, 6, 8, 14]  # 8 as measured there, 40 is off the plot
    root = ET.fromstring(reporter.plot(lines))
    drawn = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(drawn) == 3
    for element in drawn:
        for point in element.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 60 <= x <= 700 and 40 <= y <= 390


def test_measurements_have_the_arguments_that_are_passed(script):
    """No kind is called with a name that it does not know, or without one that it needs."""
    import inspect

    import bench_gpu_measure

    for run in script.all_runs():
        if Path(run.command[1]).name == "bench_gpu_measure.py":
            signature = inspect.signature(bench_gpu_measure.KINDS[run.command[2]])
            given = json.loads(run.command[3])
            signature.bind(**({"model": None} | given if "model" in signature.parameters else given))
