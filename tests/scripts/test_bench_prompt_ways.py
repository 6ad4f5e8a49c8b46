"""`bench_prompt_ways.py`: parts of a layer by the CPU on a small model, for each length."""

import json

import pytest
from click.testing import CliRunner
from model_cases import make_model

pytest.importorskip("transformers")


def test_parts_of_a_layer(tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import bench_prompt_ways

    make_model("llama-relu", tmp_path)
    asked = [str(tmp_path), "--vram-budget", "0", "--tokens", "3,17", "--runs", "1", "--threads", "2"]
    result = CliRunner().invoke(bench_prompt_ways.main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert found["ways"] == [] and found["threads"] == 2 and set(found["layer"]) == {"3", "17"}
    assert all(0 < part < parts["layer"] for parts in found["layer"].values() for part in [parts["norm"]])
