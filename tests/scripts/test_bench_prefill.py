"""`bench_prefill.py`: the peaks, and a table with a row for each length and way, on a small model."""

import json

import pytest
from click.testing import CliRunner
from model_cases import make_model

pytest.importorskip("transformers")


def test_a_table_and_a_line_for_programs(tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import bench_prefill

    make_model("llama-relu", tmp_path)
    monkeypatch.setattr(bench_prefill, "_PASSES", 1000)
    asked = [str(tmp_path), "--tokens", "20,50", "--threads", "1", "--runs", "2"]
    result = CliRunner().invoke(bench_prefill.main, asked, catch_exceptions=False)
    found = json.loads(result.output.splitlines()[-1])
    assert [(row["tokens"], row["way"]) for row in found["rows"]] == [
        (20, "precise"), (20, "fast"), (50, "precise"), (50, "fast"),
    ]  # fmt: skip
    assert all(row["best"] >= row["median"] > 0 and row["share"] > 0 for row in found["rows"])
    assert found["peaks"]["fast"] > 0 and found["threads"] == 1
