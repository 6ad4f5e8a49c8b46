"""The kernels compiled for other CPUs than this one: their tests hold there too, and no instruction is used that such
a CPU lacks."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
PARTS = "blocks matrix row_dot row_sum widen gemv sparse_ffn low_rank norm rope attention top_k"
# Of those whose answers are held against the reference; the sparse FFN's in parts go through all that it has.
CHOSEN = "matches or several_parts or four_rows_match or widen_equals or errs_by_half or errs_less"
V1 = "64bit cmov cx8 fxsr mmx sse sse2"
HASWELL = f"{V1} sse3 ssse3 sse4.1 sse4.2 avx avx2 fma f16c bmi bmi2 lzcnt movbe popcnt cx16 sahf xsave xsaveopt"
TARGETS = {"haswell": HASWELL.split(), "x86-64": V1.split()}

# Compiles the matrix-vector product for the types that need the most of a CPU, from nothing, and prints its assembly.
ASSEMBLY = """
import numpy as np, torch
from numba.core.caching import NullCache
from cpu_kernels import compiled
compiled._cache_of = lambda *_: NullCache()
from cpu_kernels import gemv
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool
pool, empty = WorkerPool(1), np.empty(0, np.float32)
kinds = [(torch.float16, None), (None, "int4")]
for dtype, blocks in kinds:
    matrix = Matrix.of(torch.ones(4, 256, dtype=dtype), blocks)
    gemv.gemv(matrix, np.ones((1, 256), np.float32), empty, np.empty((1, 4), np.float32), pool)
for text in gemv._gemv.inspect_asm().values():
    print(text)
"""


def environment(name):
    """Numba's settings that compile for a CPU with the features of `name` and no others."""
    known = binding.get_host_cpu_features()
    if platform.machine() not in ("x86_64", "AMD64") or not all(known.get(need, False) for need in TARGETS[name]):
        pytest.skip(f"this machine cannot run code for {name}")
    features = ",".join(("+" if feature in TARGETS[name] else "-") + feature for feature in sorted(known))
    return {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}


def run(name, *command):
    return subprocess.run(
        [sys.executable, *command],
        env=environment(name),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_match_their_references(name):
    files = [str(TESTS / f"test_{part}.py") for part in PARTS.split()]
    result = run(name, "-m", "pytest", "-x", "-vv", "-p", "no:cacheprovider", "-k", CHOSEN, *files)
    assert result.returncode == 0, result.stdout[-4000:]
    passed = set(re.findall(r"test_(\w+)\.py::\S+ PASSED", result.stdout))
    assert passed == set(PARTS.split())


@pytest.mark.parametrize("name", TARGETS)
def test_no_instruction_is_used_that_the_cpu_lacks(name):
    result = run(name, "-c", ASSEMBLY)
    assert result.returncode == 0, result.stderr
    code = result.stdout
    assert len(re.findall(r"^\s+ret", code, re.M)) >= 2
    assert not re.search(r"%zmm|%k[1-7]", code)
    vex_encoded = re.findall(r"^\s+v[a-z0-9]+\s+.*%[xy]mm.*$", code, re.M)
    if name == "x86-64":
        assert not vex_encoded and "%ymm" not in code
    else:
        assert any("vcvtph2ps" in line for line in vex_encoded)
        assert any("vpmaddwd" in line and "%ymm" in line for line in vex_encoded)
