"""`bench_gpu_kernels.py`: it refuses to run without a GPU, its rows, and that no two cases share a name."""

import subprocess
import sys

import pytest
import torch


@pytest.fixture
def script(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import bench_gpu_kernels

    return bench_gpu_kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(request):
    path = request.config.rootpath / "scripts" / "bench_gpu_kernels.py"
    ran = subprocess.run([sys.executable, path, "--only", "none"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "error: GPU kernels are timed on a CUDA GPU, and none was found\n"


def test_rows_line_up_and_wrong_answers_show(script):
    right = script.Timing("gemv bf16 out 4096x4096", 33.6, 12.5, 2688.0, 0.9, None, 1e-6)
    wrong = script.Timing("gemv bf16 out 4096x4096", 33.6, 12.5, 2688.0, None, 1.25, float("nan"))
    assert len(right.line) == len(script.HEADER)
    assert not right.wrong and wrong.wrong and wrong.line.endswith("WRONG")


def test_tilings_fit_registers_and_are_distinct(script):
    tilings = list(script.gemv_tilings())
    assert len(set(tilings)) == len(tilings) > 20
    assert all(len(set(script.ffn_tilings(kind))) > 20 for kind in ("bf16", "int4"))
    assert len(set(script.predictor_tilings())) > 20


def test_searches_have_names_of_their_own(script):
    names = [name for name, *_ in script.searches(["bf16", "int4"])]
    assert len(set(names)) == len(names) == 11
