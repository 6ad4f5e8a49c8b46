"""The rules of the tree that hold for every file: import order, docstrings, no bare except, size, no local paths."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = {"cpu_kernels", "gpu_kernels"}
# What the files of a folder may import of this tree, besides their own folder. Imports go one way.
MAY_IMPORT: dict[str, set[str]] = {
    "cpu_kernels": set(),
    "gpu_kernels": set(),
    "profiler": KERNELS,
    "predictor": KERNELS | {"profiler"},
    "placement": KERNELS | {"profiler", "predictor"},
    "hybrid": KERNELS | {"profiler", "predictor", "placement"},
}
PROGRAMS = {"scripts", "tests"}
MAX_LINES = 400
LOCAL_PATH = re.compile(r"(?<![\w.$}])/(?:(?:work|root)\b|(?:home|Users)/\w+)")

SOURCES = sorted(path for folder in (*MAY_IMPORT, *PROGRAMS) for path in (ROOT / folder).rglob("*.py"))
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def imported_folders(tree: ast.AST) -> set[str]:
    """Top-level names that `tree` imports, at module level or inside functions; relative imports stay at home."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def forbidden_imports(folder: str, tree: ast.AST) -> set[str]:
    """Folders of this tree that a file in `folder` imports against the order."""
    allowed = MAY_IMPORT[folder] | {folder} if folder in MAY_IMPORT else set(MAY_IMPORT)
    return imported_folders(tree) & (set(MAY_IMPORT) | PROGRAMS) - allowed


def bare_excepts(tree: ast.AST) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]


def test_every_package_has_a_place_in_the_order():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["setuptools"]["packages"]) == set(MAY_IMPORT)
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_IMPORT) | PROGRAMS


@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        ("cpu_kernels", "import numba\nimport profiler.spec", {"profiler"}),
        ("gpu_kernels", "from cpu_kernels import gemv", {"cpu_kernels"}),
        ("profiler", "from cpu_kernels.gemv import gemv\nfrom profiler import spec", set()),
        ("profiler", "def f():\n    from hybrid.engine import Engine", {"hybrid"}),
        ("predictor", "from placement import Placement", {"placement"}),
        ("placement", "import predictor, profiler, hybrid", {"hybrid"}),
        ("hybrid", "from . import engine\nfrom placement.cost import CostModel", set()),
        ("hybrid", "import tests.fake_chat", {"tests"}),
        ("tests", "import hybrid, gpu_kernels, scripts", {"scripts"}),
    ],
)
def test_the_order_itself(folder, source, expected):
    assert forbidden_imports(folder, ast.parse(source)) == expected


def test_bare_except_is_found():
    assert bare_excepts(ast.parse("try:\n    f()\nexcept:\n    pass")) == [3]
    assert bare_excepts(ast.parse("try:\n    f()\nexcept OSError:\n    pass")) == []


@every_source
def test_source_file(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert forbidden_imports(path.relative_to(ROOT).parts[0], tree) == set(), "imports against the order"
    assert ast.get_docstring(tree), "no module docstring"
    assert bare_excepts(tree) == [], "lines with a bare except"
    assert len(text.splitlines()) <= MAX_LINES, "split the file by what its parts do"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /" + "root/x", True),
        ("'/" + "home/me/x'", True),
        ("hybrid/" + "work/x", False),
        ("$top/" + "work/x", False),
    ],
)
def test_local_paths_are_found(text, found):
    assert bool(LOCAL_PATH.search(text)) is found


def test_no_file_names_a_local_path():
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    offending = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix == ".safetensors" or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        offending += [f"{name}: {match.group()}" for match in LOCAL_PATH.finditer(text)]
    assert offending == []
