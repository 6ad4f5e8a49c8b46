"""The kernel cache: the second start compiles nothing, edits are seen, and no state of the disk is an error."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels import compiled, folders, linked
from cpu_kernels.compiled import kernel, subroutine, target_features

# A package of a kernel and a subroutine that it calls; it prints what came of the cache.
HELPER = """
from cpu_kernels.compiled import subroutine

@subroutine
def scaled(x):
    return x * 2
"""
CALLER = """
from cpu_kernels.compiled import kernel
from cpu_kernels.helper import scaled

@kernel
def total(x):
    return scaled(x[0]) + scaled(x[1])
"""
PROGRAM = """
import numpy as np
from cpu_kernels.caller import total
print(total(np.ones(2)), sum(total.stats.cache_hits.values()), sum(total.stats.cache_misses.values()))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the package's cache beside a small kernel and its subroutine, and an empty home."""
    package = tmp_path / "tree" / "cpu_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for module in (compiled, folders, linked):
        shutil.copy(module.__file__, package)
    (package / "helper.py").write_text(HELPER)
    (package / "caller.py").write_text(CALLER)
    (tmp_path / "home").mkdir()
    return tmp_path


def environment(tree, **changes):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "XDG", "PYTHON"))}
    return {**kept, "HOME": str(tree / "home"), "PYTHONPATH": str(tree / "tree"), **changes}


def start(tree, program=PROGRAM, **changes):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tree,
        env=environment(tree, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Answer, cache hits and misses of the called kernel."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not err
    answer, hits, misses = out.split()
    return float(answer), int(hits), int(misses)


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*.kernel"))


def test_the_second_start_compiles_nothing_and_an_edited_helper_is_seen(tree):
    assert finish(start(tree)) == (4.0, 0, 1)
    first = files(tree)
    assert len(first) == 2
    assert finish(start(tree)) == (4.0, 1, 0)
    assert files(tree) == first

    helper = tree / "tree" / "cpu_kernels" / "helper.py"
    helper.write_text(HELPER.replace("* 2", "* 3"))
    assert finish(start(tree)) == (6.0, 0, 1)
    second = files(tree)
    assert len(second) == 2  # stale files are gone
    assert not set(first) & set(second)


def test_another_caller_links_what_the_first_left_on_disk(tree):
    """A subroutine has no code of its own: a caller that is not on disk compiles it again, from there."""
    (tree / "tree" / "cpu_kernels" / "other.py").write_text(CALLER.replace("def total", "def twice"))
    assert finish(start(tree)) == (4.0, 0, 1)
    program = (
        PROGRAM.replace("caller import total", "other import twice as total")
        + """
from cpu_kernels.helper import scaled
assert sum(scaled.stats.cache_hits.values()) == 1 and not scaled.stats.cache_misses
(library,) = (each.library for each in scaled.overloads.values())
assert type(library).__name__ == "LinkedLibrary"
"""
    )
    assert finish(start(tree, program)) == (4.0, 0, 1)
    assert finish(start(tree, program.split("from cpu_kernels.helper")[0])) == (4.0, 1, 0)


def test_another_target_has_its_own_files(tree):
    plain = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    both = [start(tree), start(tree, **plain)]
    assert [finish(process) for process in both] == [(4.0, 0, 1)] * 2
    assert len(files(tree)) == 4
    both = [start(tree), start(tree, **plain)]
    assert [finish(process) for process in both] == [(4.0, 1, 0)] * 2


def test_a_start_without_a_folder_beside_the_sources_uses_the_users(tree):
    """As root permission bits bind nobody: the folder's name is taken by a file instead."""
    (tree / "tree" / "cpu_kernels" / "__pycache__").write_text("")
    assert finish(start(tree)) == (4.0, 0, 1)
    assert len(files(tree / "home" / ".cache" / "hybrid" / "kernels")) == 2
    assert finish(start(tree, XDG_CACHE_HOME="/dev/null/cache")) == (4.0, 0, 1)


def test_processes_that_compile_at_once_do_not_disturb_each_other(tree):
    for result in [finish(process) for process in [start(tree) for _ in range(3)]]:
        assert result[0] == 4.0
    assert len(files(tree)) == 2
    assert finish(start(tree)) == (4.0, 1, 0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Takes the place of all cache folders of this process."""
    monkeypatch.setattr(compiled, "_folders", lambda: iter([tmp_path / "kernels"]))
    return tmp_path / "kernels"


def tripled(factor=3):
    """A kernel that knows nothing of an earlier one but what is on disk, as after a new start."""

    @kernel
    def scaled(x):
        return x * factor

    return scaled


def hits(scaled, factor=3):
    assert scaled(7) == 7 * factor
    return scaled.stats.cache_hits.total()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_file_is_ignored_and_replaced(folder, damage):
    assert hits(tripled()) == 0
    (path,) = folder.iterdir()
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": data[:-100], "flipped": bytes(flipped)}[damage])
    assert hits(tripled()) == 0
    assert hits(tripled()) == 1


def test_a_file_that_cannot_be_read_or_replaced_costs_only_time(folder):
    assert hits(tripled()) == 0
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert hits(tripled()) == hits(tripled()) == 0
    assert [path] == list(folder.iterdir())  # nothing half-written is left


def test_a_full_disk_costs_only_time(folder, monkeypatch):
    def fail(path, data):
        path.touch()
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert hits(tripled()) == hits(tripled()) == 0
    assert not files(folder)


def test_a_read_only_folder_is_read_and_no_error(folder, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "read-only file system")

    assert hits(tripled()) == 0
    for name in ("write_bytes", "mkdir", "touch", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    assert hits(tripled()) == 1
    assert hits(tripled(5), 5) == 0


def test_kernels_that_differ_in_a_closed_value_do_not_share_a_file(folder):
    assert hits(tripled(3), 3) == hits(tripled(5), 5) == 0
    assert hits(tripled(3), 3) == hits(tripled(5), 5) == 1


def test_a_kernel_that_closes_over_a_kernel_is_not_cached(folder):
    inner = tripled()

    @kernel
    def outer(x):
        return inner(x) + 1

    assert outer(1) == 4
    assert outer.stats.cache_path is None


def test_kernels_release_the_gil_and_take_options():
    @kernel(fastmath=True)
    def doubled(x):
        """Kept."""
        return x + x

    assert doubled.targetoptions["nogil"] and doubled.targetoptions["fastmath"]
    assert doubled.__doc__ == "Kept."


def test_a_subroutine_is_for_kernels_alone(folder):
    def make():
        @subroutine
        def doubled(x):
            return x + x

        return doubled

    first = make()
    with pytest.raises(TypeError, match="doubled is a subroutine: only compiled code can call it"):
        first(1)

    @kernel
    def outer(x):
        return first(x) + 1

    assert outer(1) == 3 and len(files(folder)) == 1
    with pytest.raises(TypeError, match="only compiled code"):  # compiled or not
        first(1)


def test_numbas_own_cache_is_used_nowhere():
    """It refuses to import a function where no folder can be written."""
    root = Path(compiled.__file__).parents[1]
    packages = ("cpu_kernels", "gpu_kernels", "profiler", "predictor", "placement", "hybrid", "scripts")
    sources = [path for package in packages for path in (root / package).rglob("*.py")]
    compilers = {"jit", "njit", "vectorize", "guvectorize", "cfunc"}
    options = {
        (path.relative_to(root).as_posix(), keyword.arg)
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in compilers
        for keyword in node.keywords
    }
    assert ("cpu_kernels/compiled.py", "nogil") in options
    assert [path for path, option in options if option == "cache"] == []


def test_target_features_follow_the_order_of_the_list():
    class Context:
        def codegen(self):
            return self

        def magic_tuple(self):
            return "x86_64", "haswell", "+avx2,+fma,-avx512f,+bmi,-bmi"

    assert target_features(Context()) == {"avx2", "fma"}
