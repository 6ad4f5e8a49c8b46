"""`bench_kernels.py`: its cases compute what the references do and count the right bytes; tables, JSON and CSV."""

import csv
import json

import numpy as np
import pytest

from cpu_kernels.matrix import Matrix
from cpu_kernels.sparse_ffn import sparse_ffn_ref
from cpu_kernels.worker_pool import WorkerPool

DTYPES = ["bf16", "f16", "f32", "int8", "int4"]


@pytest.fixture
def scripts(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import bench_kernels
    import kernel_cases

    return bench_kernels, kernel_cases


@pytest.fixture(scope="module")
def pool():
    made = WorkerPool(2)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_matrices_have_the_shape_and_rows_asked_for(scripts, dtype):
    _, cases = scripts
    matrix = cases.random_matrix(dtype, 1500, 96)
    assert isinstance(matrix, Matrix) and matrix.shape == (1500, 96) and matrix.dtype == dtype
    assert 0.04 < float(matrix.widen().std()) < 0.06
    twin = cases.as_torch(matrix)
    if dtype in ("int8", "int4"):
        assert twin is None
    else:
        np.testing.assert_array_equal(twin.float().numpy(), matrix.widen().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_in_one_call_add_up_to_the_reference(scripts, pool, dtype):
    _, cases = scripts
    layers = cases.SparseLayers(dtype, 96, 0.1, cases.Sizes(total=2**20, workers=2))
    rows = next(layers.rows)
    layers.rows = iter([rows])
    layers.run(pool)
    expected = np.zeros_like(layers.out)
    for number, view in enumerate(layers.order):
        mine = rows[layers.starts[number] : layers.starts[number + 1]]
        assert (np.diff(mine) > 0).all() and mine[-1] < layers.f
        sparse_ffn_ref(view, layers.x, mine, np.array([0, mine.size]), expected)
    np.testing.assert_allclose(layers.out, expected, atol=1e-3 * np.abs(expected).max())
    assert layers.nbytes == rows.size * layers.views[0].row_bytes


def test_a_pass_reads_other_rows_than_the_one_before(scripts):
    _, cases = scripts
    layers = cases.SparseLayers("f32", 96, 0.1, cases.Sizes(2**20, 1))
    assert not np.array_equal(next(layers.rows), next(layers.rows))


def test_bytes_of_a_pass(scripts):
    _, cases = scripts
    sizes = cases.Sizes(total=2**21, workers=1)
    found = cases.gemv_case("bf16", 128, sizes)
    assert found.nbytes == 2**21 and found.calls == 1
    assert (
        cases.attention_case(256, 100, sizes).nbytes == cases.attention_case(256, 100, sizes).calls * 2 * 100 * 256 * 4
    )
    assert cases.predictor_case(64, sizes).nbytes >= sizes.total


def test_every_case_runs_and_is_reported(scripts, tmp_path, capsys, monkeypatch):
    bench, cases = scripts
    monkeypatch.setattr(cases, "NEURONS", {2048: 64})
    monkeypatch.setattr(bench, "available_cpus", lambda: 2)
    arguments = ["--quick", "--megabytes", "1", "--passes", "5", "--threads", "1,2", "--csv", str(tmp_path / "k.csv")]
    bench.main(arguments, standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["kernels"]
    assert lines[0].startswith("read bandwidth, GB/s: ") and any(line.startswith("GB/s, threads") for line in lines)
    assert len(found) == 30 and all(each["gigabytes"]["p50"] > 0 and each["over_reference"] > 0 for each in found)
    assert {each["threads"] for each in found} == {1, 2}
    assert all((each["share"] is None) == each["case"].startswith(("rms_norm", "rope", "top_k")) for each in found)
    assert [row["case"] for row in csv.DictReader((tmp_path / "k.csv").open())] == [each["case"] for each in found]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "two"], "expected numbers such as"),
        (["--threads", "0"], "expected 1 to"),
        (["--threads", "9999"], "as many as this process may use"),
        (["--only", "gemm"], "no kernel's name contains 'gemm'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(scripts, capsys, arguments, message):
    bench, _ = scripts
    with pytest.raises(SystemExit) as end:
        bench.main(arguments, standalone_mode=False)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
