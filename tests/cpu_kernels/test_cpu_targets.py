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
PARTS = "blocks matrix row_dot row_sum widen gemv sparse_ffn gemm dense_ffn low_rank norm rope attention top_k"
PARTS += " prompt_attention"
# Of those whose answers are held against the reference; the sparse FFN's in parts go through all that it has. What is
# written for a CPU stands in the products and sums of rows, which are run in every type; what is made of them is run in
# the two types that need the most of a CPU.
CHOSEN = "matches or several_parts or four_rows_match or widen_equals or errs_by_half or errs_less"
OTHERS = "(sparse_ffn or gemv or prompt_attention) and (f32 or bf16 or int8 or full_batch)"
V1 = "64bit cmov cx8 fxsr mmx sse sse2"
HASWELL = f"{V1} sse3 ssse3 sse4.1 sse4.2 avx avx2 fma f16c bmi bmi2 lzcnt movbe popcnt cx16 sahf xsave xsaveopt"
TARGETS = {"haswell": HASWELL.split(), "x86-64": V1.split()}

# Compiles the matrix-vector product for those two types, from nothing, prints its assembly, and runs the tests.
PROGRAM = """
import sys
import numpy as np, pytest, torch
from numba.core.caching import NullCache
from cpu_kernels import compiled
kept, compiled._cache_of = compiled._cache_of, lambda *_: NullCache()
from cpu_kernels import gemv
compiled._cache_of = kept
from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool
pool, empty = WorkerPool(1), np.empty(0, np.float32)
kinds = [(torch.float16, None), (None, "int4")]
for dtype, blocks in kinds:
    matrix = Matrix.of(torch.ones(4, 256, dtype=dtype), blocks)
    gemv.gemv(matrix, np.ones((1, 256), np.float32), empty, np.empty((1, 4), np.float32), pool)
for text in gemv._gemv.inspect_asm().values():
    print(text)
print("END", flush=True)
pool.close()
sys.exit(pytest.main(sys.argv[1:]))
"""


def environment(name):
    """Numba's settings that compile for a CPU with the features of `name` and no others."""
    known = binding.get_host_cpu_features()
    if platform.machine() not in ("x86_64", "AMD64") or not all(known.get(need, False) for need in TARGETS[name]):
        pytest.skip(f"this machine cannot run code for {name}")
    features = ",".join(("+" if feature in TARGETS[name] else "-") + feature for feature in sorted(known))
    return {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}


@pytest.fixture(scope="module", params=TARGETS)
def ran(request):
    """A target, and what came of the program there: its exit code, the assembly, and what the tests said."""
    files = [str(TESTS / f"test_{part}.py") for part in PARTS.split()]
    chosen = f"({CHOSEN}) and not ({OTHERS})"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-x", "-vv", "-p", "no:cacheprovider", "-k", chosen, *files],
        env=environment(request.param),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    code, end, said = result.stdout.partition("END\n")
    assert end, result.stderr
    return request.param, result.returncode, code, said


def test_kernels_match_their_references(ran):
    _, status, _, said = ran
    assert status == 0, said[-4000:]
    passed = set(re.findall(r"test_(\w+)\.py::\S+ PASSED", said))
    assert passed == set(PARTS.split())


def test_no_instruction_is_used_that_the_cpu_lacks(ran):
    name, _, code, _ = ran
    assert len(re.findall(r"^\s+ret", code, re.M)) >= 2
    assert not re.search(r"%zmm|%k[1-7]", code)
    vex_encoded = re.findall(r"^\s+v[a-z0-9]+\s+.*%[xy]mm.*$", code, re.M)
    if name == "x86-64":
        assert not vex_encoded and "%ymm" not in code
    else:
        assert any("vcvtph2ps" in line for line in vex_encoded)
        assert any("vpmaddwd" in line and "%ymm" in line for line in vex_encoded)
