"""What `hybrid bench` says of many rows in a step: the table, the JSON, and where there is none."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bundle_cases import random_bundle
from model_cases import make_model
from placement_cases import NO_GPU, small_spec

from hybrid import Engine, EngineConfig
from hybrid.bench.bench import Bench, BenchConfig
from hybrid.bench.report import json_line, report
from hybrid.bench.rows import RowsResult, rows_result
from hybrid.formats.bundle import Bundle
from hybrid.model.loader import ModelFolder
from placement import Choice, CostModel, VramPlan

pytest.importorskip("transformers")
SETTING = {"date": "d", "commit": "c", "machine": "m", "model": "tiny", "dtype": "f32", "threads": 1}


def crossing(firing=0.2):
    plan = VramPlan(small_spec(d_ff=100), 8, (0,))
    hardware = replace(NO_GPU, cpu_scattered_bandwidth=5e5)
    return RowsResult.of(CostModel(plan, hardware, np.full((1, 100), firing), "learned"), Choice.all_cpu(1))


def test_the_table_says_from_when_dense_is_cheaper():
    # Of neurons of 48 bytes a step of 4 rows reads 1 - 0.8^4 = 59%, at half the speed.
    lines = [" ".join(line.split()) for line in crossing().text().splitlines()]
    assert lines[0].endswith("round numbers; cheaper is dense from 4 rows on")
    assert "4 59.0% 5,767.9 4,900.0 dense" in lines and "2 36.0% 3,556.0 4,900.0 learned" in lines
    assert "no answer may depend on what runs beside it" in lines[-1]
    rare = crossing(firing=1e-4)
    assert rare.dense_from is None and "cheaper is learned up to 32 rows" in rare.text()


def test_a_prepared_model_on_a_measured_machine_has_it(tmp_path):
    make_model("llama-relu", tmp_path)
    spec = ModelFolder.open(tmp_path).spec
    bundle = Bundle.of(tmp_path, spec)
    random_bundle(bundle, spec)
    with Engine.load(tmp_path, EngineConfig("learned", threads=1, vram_budget=0)) as engine:
        assert rows_result(engine) is None
        NO_GPU.save(bundle.hardware)
        result = Bench(engine, BenchConfig(("learned",), 4, 3, 1), probe_bytes=2**16).run(lambda count: None)
        result.rows = rows_result(engine)
    shares = [time.union_share for time in result.rows.times]
    assert shares == sorted(shares) and shares[-1] > 0.9
    assert result.rows.text() in report(result, SETTING, same_text=False)
    found = json.loads(json_line(result, SETTING))["rows"]
    assert found["hardware"] == "round numbers" and [time["rows"] for time in found["times"]] == [1, 2, 4, 8, 16, 32]
    assert found["times"][0]["union_share"] == shares[0] and found["dense_from"] == result.rows.dense_from
    with Engine.load(tmp_path, EngineConfig("dense", threads=1, vram_budget=0)) as engine:
        assert rows_result(engine) is None
