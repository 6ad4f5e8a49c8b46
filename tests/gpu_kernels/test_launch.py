"""Dependent launches: the rule that their correctness rests on, read in the source, and a chain of them on the GPU."""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import triton
from gpu_cases import DEVICE, random_input, random_matrix

from gpu_kernels import attention, compact, gemv, launch, low_rank, mailbox, norm, rope, sampling, sparse_ffn

MODULES = (attention, compact, gemv, low_rank, mailbox, norm, rope, sampling, sparse_ffn)
# What kernels may read before they wait: weights, what a step's first copies bring, keys and values of earlier steps.
EARLY = {"w", "fc1", "s1", "b1", "fc2", "s2", "b2", "positions", "cache", "weight", "weight_ptr"}
READ = re.compile(r"(?:tl\.load|load_step|_load_rows|norm_weights)\(\s*(\w+)")
MEMORY = re.compile(r"tl\.store\(|row_dots\(|compact\(|_request\(|_answered\(")


def kernels() -> dict[str, str]:
    """Source of every kernel that these modules launch."""
    found = {}
    for module in MODULES:
        source = inspect.getsource(module)
        for name in re.findall(r"^ +(_\w+)\[.*\]\(", source, re.MULTILINE):
            found[f"{module.__name__}.{name}"] = inspect.getsource(getattr(module, name).fn)
    return found


def test_a_cache_that_can_be_written_is_tritons_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "new" / "cache"))
    assert launch.own_cache() is None
    assert triton.knobs.cache.dir == str(tmp_path / "new" / "cache")


@pytest.mark.parametrize("own", ["/nowhere/.triton/cache", "~/.triton/cache"])
def test_without_a_folder_to_write_triton_compiles_into_one_of_the_process(own, monkeypatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", own)
    if own.startswith("/"):
        monkeypatch.setattr(os, "access", lambda path, mode: path != "/")
    made = launch.own_cache()
    assert made is not None and triton.knobs.cache.dir == made.name
    with made:
        (Path(made.name) / "kernel").touch()
    assert not Path(made.name).exists()


def test_all_kernels_are_found() -> None:
    assert len(kernels()) == 22


@pytest.mark.parametrize("name", kernels())
def test_kernel_waits_before_it_touches_memory(name: str) -> None:
    body = kernels()[name].split("):", 1)[1]
    assert re.search(r"^    begin\(PDL\)$", body, re.MULTILINE), "every program waits, whatever branch it takes"
    before, after = body.split("    begin(PDL)\n")
    assert set(READ.findall(before)) <= EARLY
    assert not MEMORY.search(before)
    assert READ.search(after) or MEMORY.search(after)


@pytest.mark.parametrize("module", MODULES)
def test_no_launch_without_options(module) -> None:
    assert not re.search(r"num_warps=", inspect.getsource(module))


def test_interpreter_gets_no_launch_option(monkeypatch) -> None:
    monkeypatch.setattr(launch, "is_native", lambda: False)
    assert launch.options(8) == {"num_warps": 8, "PDL": False}


def test_switch(monkeypatch) -> None:
    monkeypatch.setattr(launch, "is_native", lambda: True)
    monkeypatch.setattr(launch, "_has_dependent_launch", lambda: True)
    assert launch.options() == {"num_warps": 4, "PDL": True, "launch_pdl": True}
    monkeypatch.setattr(launch, "PDL", False)
    assert launch.options() == {"num_warps": 4, "PDL": False}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_chain_in_a_graph_is_the_same_without(monkeypatch) -> None:
    matrix, norm_weight = random_matrix(1024, 1024, "bf16"), torch.ones(1024, device=DEVICE)
    start = random_input(1, 1024)

    def chain(x: torch.Tensor, y: torch.Tensor) -> None:
        x.copy_(start)
        for _ in range(32):
            gemv.gemv(matrix, x, None, y)
            norm.residual_norm(y, norm_weight, None, 1e-5, x)

    def replayed() -> torch.Tensor:
        x, y = torch.empty_like(start), torch.empty_like(start)
        chain(x, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(x, y)
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        return x

    early = replayed()
    monkeypatch.setattr(launch, "PDL", False)
    assert torch.equal(early, replayed())
