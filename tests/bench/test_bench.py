"""`hybrid bench`: bytes a token, the runs, what is printed and stored, and the peer beside them."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_cases import CASES, SHAPE, make_model

from hybrid import Engine, EngineConfig
from hybrid.bench.bench import Bench, BenchConfig
from hybrid.bench.ceiling import bytes_per_token
from hybrid.bench.measurements import Spread, append_csv, commit, machine
from hybrid.bench.peers import GreedyRun, LlamaCpp
from hybrid.bench.report import PEER, BenchResult, Summary, csv_rows, json_line, report
from hybrid.cli import main
from hybrid.errors import ContextError, InputError
from hybrid.model.ffn import FFNCounters

pytest.importorskip("transformers")
CONFIG = BenchConfig(("dense", "exact"), prompt_tokens=9, tokens=6, runs=3)
SETTING = {"date": "d", "commit": "c", "machine": "m", "model": "tiny", "dtype": "f32", "threads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama-relu", path)
    return path


@pytest.fixture
def engine(folder):
    with Engine.load(folder, EngineConfig("exact", threads=1)) as made:
        yield made


def run(prompt, tokens, ttft=0.5, interval=0.1):
    return GreedyRun(prompt, tuple(tokens), ttft, (interval,) * (len(tokens) - 1))


def result(peer=False):
    dense = [run(10, [1, 2, 3, 4], interval=each) for each in (0.1, 0.2, 0.4)]
    exact = [run(10, [1, 2, 9, 9], interval=each) for each in (0.05, 0.05, 0.1)]
    return BenchResult(
        runs={"dense": dense, "exact": exact},
        bytes={"dense": {"attention": 60, "FFN": 40}, "exact": {"attention": 60, "FFN": 15}},
        counters={
            "dense": FFNCounters(100, 100, 5, 5, attention_seconds=0.9, ffn_seconds=0.9, head_seconds=0.09),
            "exact": FFNCounters(100, 10, 5, 5, ffn_seconds=0.3),
        },
        bandwidths=[1000.0, 2000.0, 4000.0],
        cores=[1.9, 1.0, 2.0],
        peer_runs=[run(10, [1, 2, 3, 3], interval=each) for each in (0.2, 0.2, 0.2)] if peer else [],
    )


def matrix(rows, row_bytes):
    return SimpleNamespace(nbytes=rows * row_bytes, row_bytes=row_bytes)


def test_bytes_of_a_token_are_the_rows_that_it_needs(engine):
    spec, counters = engine.model.spec, FFNCounters(neurons=200, computed=50, fired=20)
    parts = {name: bytes_per_token(engine.model, name, counters, 20.0) for name in ("dense", "exact", "learned")}
    rows = spec.n_layers * spec.d_ff * spec.d_model * 4
    assert parts["dense"]["FFN"] == 3 * rows
    assert parts["exact"]["FFN"] == pytest.approx(rows * 1.2, abs=1)
    assert parts["learned"]["FFN"] == pytest.approx(rows * (0.25 + 2 * 0.1), abs=1)
    for part in parts.values():
        assert part["attention"] == spec.n_layers * 4 * 48 * (48 + 2 * 16 + 48)  # qkv [80, 48] and out [48, 48]
        assert part["keys and values"] == spec.n_layers * 2 * 20 * 2 * 8 * 4
        assert part["head"] == 131 * 48 * 4
        assert part["norms, embedding"] == (2 * spec.n_layers + 1) * 48 * 4 + 48 * 4


def test_predictors_and_the_window_are_counted():
    block = SimpleNamespace(
        attention=SimpleNamespace(
            window=7, qkv=SimpleNamespace(matrix=matrix(3, 8)), out=SimpleNamespace(matrix=matrix(2, 8))
        )
    )
    spec = SimpleNamespace(
        n_layers=2,
        d_ff=10,
        d_model=4,
        rows_per_neuron=2,
        norm="layer",
        kv_bytes_per_layer=lambda n: n,
    )
    ffn = SimpleNamespace(up=matrix(10, 8), predictor=SimpleNamespace(nbytes=33))
    model = SimpleNamespace(
        spec=spec, blocks=[block] * 2, ffns=[ffn] * 2, head=SimpleNamespace(matrix=matrix(5, 8)), embedding=matrix(5, 8)
    )
    counters = FFNCounters(neurons=10, computed=5, fired=1)
    parts = bytes_per_token(model, "learned", counters, 20.0)
    assert parts["predictor"] == 66 and bytes_per_token(model, "exact", counters, 20.0)["predictor"] == 0
    assert parts["keys and values"] == 14 and bytes_per_token(model, "dense", counters, 3.0)["keys and values"] == 6
    assert parts["FFN"] == 2 * 10 * 8 * 0.6 and parts["norms, embedding"] == 4 * 5 * 4 * 2 + 8


def test_runs_take_turns_from_an_empty_cache_and_ignore_end_tokens(engine, monkeypatch):
    first = [step.token for step in engine.generate([1, 2, 3])]
    engine.end_tokens = frozenset(range(131))
    runner, order, done = Bench(engine, CONFIG, probe_bytes=2**16), [], []
    ours = runner.ours
    monkeypatch.setattr(
        runner, "ours", lambda strategy, count: order.append((strategy, count)) or ours(strategy, count)
    )
    found = runner.run(done.append)
    assert order == [("dense", 4), ("exact", 4)] + 3 * [("dense", 6), ("exact", 6)]
    assert len(first) > 0 and len(done) == runner.turns == 6 and len(found.bandwidths) == 3
    assert all(len(each.tokens) == 6 and each.prompt_tokens == 9 for runs in found.runs.values() for each in runs)
    assert len({each.tokens for runs in found.runs.values() for each in runs}) == 1
    assert found.counters["dense"].neurons == found.counters["dense"].computed == 3 * 5 * 3 * 85
    assert found.counters["exact"].computed < found.counters["dense"].computed


def test_by_default_all_strategies_up_to_what_the_engine_was_loaded_for(engine, tmp_path):
    assert Bench(engine, BenchConfig(tokens=4, prompt_tokens=4), probe_bytes=2**16).strategies == ("dense", "exact")
    make_model("mistral-full", tmp_path)
    with Engine.load(tmp_path, EngineConfig(threads=1)) as silu:
        assert Bench(silu, BenchConfig(tokens=4, prompt_tokens=4), probe_bytes=2**16).strategies == ("dense",)


@pytest.mark.parametrize(
    ("strategies", "loaded"), [((), "auto"), (("learned", "dense"), "learned"), (("dense",), "dense")]
)
def test_the_engine_is_loaded_for_the_most_that_is_asked(strategies, loaded):
    assert BenchConfig(strategies).engine_sparsity == loaded


@pytest.mark.parametrize(
    "fields", [{"strategies": ("dense", "sparse")}, {"strategies": ("dense", "dense")}, {"tokens": 1}, {"runs": 0}]
)
def test_senseless_settings_are_refused(fields):
    with pytest.raises(InputError):
        BenchConfig(**fields)


def test_runs_longer_than_the_context_are_refused(engine):
    with pytest.raises(ContextError, match=r"60 \+ 5 tokens exceed a context of 64"):
        Bench(engine, BenchConfig(prompt_tokens=60, tokens=5))


def test_numbers_of_a_strategy():
    found = result(peer=True).summaries
    dense, exact = found["dense"], found["exact"]
    assert dense.speed == Spread(*(pytest.approx(value) for value in (3.5, 5.0, 8.0)))
    assert dense.share_of_ceiling == pytest.approx(5 * 100 / 2000) and dense.prefill == 20 and dense.ttft == 500
    assert dense.tpot[0] == pytest.approx(200) and dense.tpot[2] == pytest.approx(400)
    assert (dense.active_share, exact.active_share, dense.agreement, exact.agreement) == (1, 0.1, 1, 0.5)
    assert dense.milliseconds["attention"] == pytest.approx(100)
    assert sum(dense.milliseconds.values()) == pytest.approx(1000 * 0.7 / 3)
    assert exact.over_peer.of_medians == pytest.approx(4)
    assert (exact.over_peer.least, exact.over_peer.greatest) == (pytest.approx(2), pytest.approx(4))
    assert found[PEER] == Summary.of(result(peer=True).peer_runs)


def test_the_ceiling_is_printed_first():
    text = report(result(), SETTING, same_text=False)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1].startswith("read bandwidth 0.0 GB/s") and lines[1].endswith("with 1.0 to 2.0 cores")
    places = [
        lines.index(line)
        for line in ("ceiling, tok/s 20.0 26.7", "tok/s, median 5.0 20.0", "ms per token dense GB/s exact GB/s")
    ]
    assert places == sorted(places)
    assert PEER not in text


@pytest.mark.parametrize(
    ("same_text", "line"), [(True, "75.0% of llama.cpp's tokens"), (False, "in place of this model's")]
)
def test_the_peer_is_compared(same_text, line):
    text = report(result(peer=True), SETTING, same_text)
    assert line in text and "exact over llama.cpp: 4.00 (medians; pairs 2.00 to 4.00)" in text


def test_json_and_csv_hold_every_side(tmp_path):
    found = json.loads(json_line(result(peer=True), SETTING))
    assert found["read_bandwidth"] == 2000 and list(found["results"]) == ["dense", "exact", PEER]
    assert found["results"]["exact"]["bytes"] == {"attention": 60, "FFN": 15}
    for _ in range(2):
        append_csv(tmp_path / "b.csv", csv_rows(result(peer=True), SETTING))
    rows = list(csv.DictReader((tmp_path / "b.csv").read_text().splitlines()))
    assert [row["strategy"] for row in rows] == ["dense", "exact", PEER] * 2
    assert float(rows[0]["tokens_per_second_p50"]) == pytest.approx(5) and rows[2]["bytes_per_token"] == ""


def test_a_csv_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="has columns a,b"):
        append_csv(tmp_path / "b.csv", csv_rows(result(), SETTING))
    with pytest.raises(InputError, match="cannot add rows"):
        append_csv(tmp_path, csv_rows(result(), SETTING))
    assert (tmp_path / "b.csv").read_text() == "a,b\n1,2\n"


def test_machine_and_commit_are_known():
    assert machine() and commit()


def test_the_command_prints_tables_or_one_json_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "hybrid.bench.bench.BandwidthProbe", lambda pool, size: SimpleNamespace(measure=lambda: 1e9, cores=2.0)
    )
    arguments = ["--sparsity", "exact", "--prompt-tokens", "9", "--tokens", "5", "--runs", "2", "--threads", "2"]
    with pytest.raises(SystemExit) as end:
        main(["bench", str(folder), *arguments])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "read bandwidth 1.0 GB/s" in out and "{" not in out
    with pytest.raises(SystemExit) as end:
        main(["bench", str(folder), *arguments, "--json", "--csv", str(tmp_path / "b.csv")])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert found["results"]["exact"]["runs"] == 2 and found["model"] == folder.name and found["threads"] == 2
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "sparse"], "dense, exact, learned"),
        (["--peer", "llama.cpp"], "--peer-model go together"),
        (["--sparsity", "learned"], "predictors.safetensors is missing"),
        (["--sparsity", "dense", "--peer", "llama.cpp", "--peer-model", "no.gguf"], "no.gguf does not exist"),
        (["--sparsity", "dense", "--tokens", "1000"], "exceed a context of 64"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, monkeypatch, arguments, message):
    pytest.importorskip("llama_cpp")
    with pytest.raises(SystemExit) as end:
        main(["bench", str(folder), *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_a_missing_peer_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"pip install hybrid-inference\[peers\]"):
        LlamaCpp(Path("m.gguf"), 1, 64)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match=r"llama\.cpp cannot load"):
        LlamaCpp(tmp_path / "m.gguf", 1, 64)


def test_the_peer_writes_the_text_of_dense(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import gguf_model

    monkeypatch.setitem(CASES, "silu", ("Llama", SHAPE | {"hidden_act": "silu"}))
    make_model("silu", tmp_path / "model")
    gguf_model.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    peer = LlamaCpp(tmp_path / "m.gguf", 1, 64)
    with Engine.load(tmp_path / "model", EngineConfig(threads=1)) as engine:
        peer.refuse_other_shape(engine.model.spec)
        found = Bench(engine, BenchConfig(prompt_tokens=9, tokens=12, runs=2), peer, probe_bytes=2**16).run(
            lambda n: None
        )
    peer.close()
    assert found.peer_runs[0].tokens == found.peer_runs[1].tokens == found.runs["dense"][0].tokens
    assert len(found.peer_runs[0].intervals) == 11


def test_a_peer_of_another_shape_is_refused(tmp_path, folder, engine, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import gguf_model

    monkeypatch.setitem(CASES, "short", ("Llama", SHAPE | {"hidden_act": "relu", "num_hidden_layers": 2}))
    make_model("short", tmp_path / "model")
    gguf_model.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
    peer = LlamaCpp(tmp_path / "m.gguf", 1, 64)
    with pytest.raises(InputError, match="layers 2, this one 3"):
        peer.refuse_other_shape(engine.model.spec)
    peer.close()
