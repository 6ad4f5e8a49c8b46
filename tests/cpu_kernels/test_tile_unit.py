"""The tile unit's instructions, where this process may use them, and what stands in for them elsewhere, against NumPy;
then the products of `gemm.py` and `dense_ffn.py` in bf16 terms on CPUs without such a unit."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic
from soft_tiles import SoftTileUnit, bf16, dot_ref

from cpu_kernels import panels, tile_unit
from cpu_kernels.compiled import kernel
from cpu_kernels.lanes import Code
from cpu_kernels.terms import terms_in
from cpu_kernels.tile_unit import TileUnit, row_stride, tiles_usable

TESTS = Path(__file__).parent
# Rows as they are stored and rows that are split, whole tiles and others, and each form.
CHOSEN = "(matches or gemm and same_bits) and fast and bf16 or dense_ffn and matches and precise and f32"

PROGRAM = """
import sys
import pytest
from numba.core.caching import NullCache
from cpu_kernels import compiled, tile_unit
from soft_tiles import SoftTileUnit
compiled._cache_of = lambda *_: NullCache()
tile_unit.TileUnit, tile_unit.tiles_usable = SoftTileUnit, lambda: True
from cpu_kernels.gemm import GemmScratch
from cpu_kernels.terms import THREE_TERMS, TWO_TERMS
assert GemmScratch(1, "precise").form is THREE_TERMS and GemmScratch(1, "fast").form is TWO_TERMS
sys.exit(pytest.main(sys.argv[1:]))
"""


def dot_by(unit):
    """A kernel that adds a product of tiles to another tile."""

    @intrinsic
    def dot(typing_context, to, a, b):
        def generate(context, builder, signature, args):
            code = unit(Code(context, builder))
            code.configure()
            for tile, address in enumerate(args):
                code.load(tile, address, row_stride())
            code.dot(0, 1, 2)
            code.store(0, args[0], row_stride())
            code.release()
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 3), generate

    @kernel
    def run(to, a, b):
        dot(to.ctypes.data, a.ctypes.data, b.ctypes.data)

    return run


@pytest.mark.parametrize("unit", [SoftTileUnit, TileUnit])
def test_a_product_of_tiles(unit):
    if unit is TileUnit and not tiles_usable():
        pytest.skip("this CPU has no tile unit, or the system does not let us use it")
    rng, run = np.random.default_rng(0), dot_by(unit)
    for _ in range(20):
        a, b = ((rng.standard_normal((16, 32), np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in range(2))
        to = rng.standard_normal((16, 16), np.float32)
        expected, (wide, pairs) = dot_ref(to, a, b), (bf16(a), bf16(b).reshape(16, 16, 2))
        run(to, a, b)
        size = np.abs(wide) @ np.abs(pairs).transpose(0, 2, 1).reshape(32, 16)
        assert (np.abs(to - expected) <= 2e-7 * (size + np.abs(expected))).all()


@pytest.mark.parametrize(("usable", "precise", "fast"), [(True, 3, 2), (False, 0, 0)])
def test_the_form_follows_the_cpu(monkeypatch, usable, precise, fast):
    monkeypatch.setattr(panels, "tiles_usable", lambda: usable)
    assert [terms_in(panels.form_of(precision)) for precision in ("precise", "fast")] == [precise, fast]


@pytest.mark.parametrize(
    ("features", "answer", "usable"),
    [
        ({"amx-tile", "amx-bf16", "avx512f", "avx512bw"}, 0, True),
        ({"amx-tile", "amx-bf16", "avx512f", "avx512bw"}, -1, False),
        ({"amx-tile", "amx-bf16"}, 0, False),
        ({"avx512f", "avx512bw"}, 0, False),
    ],
)
def test_tiles_are_usable_where_the_cpu_has_them_and_the_system_agrees(monkeypatch, features, answer, usable):
    asked = []

    class Library:
        def syscall(self, *words):
            asked.append(words)
            return answer

    monkeypatch.setattr(tile_unit, "target_features", lambda _: frozenset(features))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    monkeypatch.setattr(sys, "platform", "linux")
    assert tile_unit.tiles_usable.__wrapped__() is usable
    assert asked == ([(158, 0x1023, 18)] if len(features) == 4 else [])


def test_products_in_terms_match_their_references():
    files = [str(TESTS / f"test_{part}.py") for part in ("gemm", "dense_ffn")]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-x", "-vv", "-p", "no:cacheprovider", "-k", CHOSEN, *files],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS.parents[1]}"},
        cwd=TESTS.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = set(re.findall(r"test_(\w+)\.py::\S+ PASSED", result.stdout))
    assert passed == {"gemm", "dense_ffn"}
