"""The rules of the tree that hold for every file: imports go one way between rooms and in no circle, docstrings, no
bare except, size, no local paths, tests lie where what they test lies."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = "cpu_kernels.contract"  # what kernels of both devices agree on; imports nothing
KERNELS = {CONTRACT, "cpu_kernels", "gpu_kernels"}
GROUND = KERNELS | {"profiler.common"}
OFFLINE = GROUND | {"profiler", "profiler.machine", "predictor", "placement"}
WORDS = {"hybrid.errors", "hybrid.console", "hybrid.generation"}
FORMATS = OFFLINE | WORDS | {"hybrid.formats"}
MODEL = FORMATS | {"hybrid.model"}
RUNTIME = MODEL | {"hybrid.runtime", "hybrid.runtime.gpu"}
# What the files of a room may import of this tree, besides their own room. A file is of the longest name that fits.
MAY_IMPORT: dict[str, set[str]] = {
    CONTRACT: set(),
    "cpu_kernels": {CONTRACT},
    "gpu_kernels": {CONTRACT},
    "profiler.common": KERNELS,
    "profiler.machine": GROUND,
    "profiler": GROUND,
    "predictor": GROUND | {"profiler"},
    "placement": GROUND | {"profiler", "predictor"},
    "hybrid.errors": GROUND,
    "hybrid.console": GROUND | WORDS,
    "hybrid.generation": GROUND | WORDS,
    "hybrid.formats": OFFLINE | WORDS,
    "hybrid.model": FORMATS,
    "hybrid.offline": MODEL,
    "hybrid.runtime": RUNTIME,
    "hybrid.runtime.gpu": RUNTIME,
    "hybrid.chat": RUNTIME,
    "hybrid.serving": RUNTIME,
    "hybrid.server": RUNTIME | {"hybrid.serving"},
    "hybrid.bench": RUNTIME,
    "hybrid": RUNTIME | {"hybrid.offline", "hybrid.chat", "hybrid.bench", "hybrid.serving", "hybrid.server"},
}
PACKAGES = {room.partition(".")[0] for room in MAY_IMPORT}
PROGRAMS = {"scripts", "tests"}
MAX_LINES = 400
LOCAL_PATH = re.compile(r"(?<![\w.$}])/(?:(?:work|root)\b|(?:home|Users)/\w+)")

SOURCES = sorted(path for folder in (*PACKAGES, *PROGRAMS) for path in (ROOT / folder).rglob("*.py"))
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def module_of(path: Path) -> str:
    """`hybrid/model/ffn.py` is `hybrid.model.ffn`; a package's `__init__` has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in SOURCES}


def room_of(module: str) -> str:
    """The longest room whose name `module` begins with; the top-level folder where there is none."""
    rooms = [room for room in MAY_IMPORT if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default=module.partition(".")[0])


def imported_modules(tree: ast.AST, home: str, modules: set[str]) -> set[str]:
    """Modules of this tree that `tree`, of the package `home`, imports, at module level or inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(home.split(".")[: len(home.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names)
    return {name for name in names if name.partition(".")[0] in PACKAGES | PROGRAMS}


def forbidden_imports(module: str, tree: ast.AST) -> set[str]:
    """Rooms that a file of `module` imports against the order. Scripts and tests may import all but each other."""
    room = room_of(module)
    allowed = MAY_IMPORT[room] | {room} if room in MAY_IMPORT else set(MAY_IMPORT)
    return {room_of(name) for name in imported_modules(tree, module.rpartition(".")[0], MODULES)} - allowed


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next(filter(None, (walk(other, [*path, name]) for other in sorted(arrows.get(name, ())))), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(arrows))), [])


def bare_excepts(tree: ast.AST) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]


def test_every_folder_has_a_place_in_the_order():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.removesuffix("*") for pattern in included} == PACKAGES
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == PACKAGES | PROGRAMS
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES
    }
    assert folders <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("cpu_kernels.a", "import numba\nimport profiler.common.spec", {"profiler.common"}),
        ("gpu_kernels.a", "from cpu_kernels import gemv", {"cpu_kernels"}),
        ("gpu_kernels.a", "from cpu_kernels import contract\nfrom cpu_kernels.contract import Op", set()),
        ("cpu_kernels.contract", "from cpu_kernels.blocks import FORMATS", {"cpu_kernels"}),
        ("profiler.corpus", "from cpu_kernels.gemv import gemv\nfrom profiler.common import spec", set()),
        ("profiler.common.spec", "from profiler import corpus", {"profiler"}),
        ("profiler.corpus", "def f():\n    from hybrid.runtime.engine import Engine", {"hybrid.runtime"}),
        ("predictor.bank", "from placement import Placement", {"placement"}),
        ("placement.cost", "import predictor, profiler, hybrid", {"hybrid"}),
        ("hybrid.commands", "from .runtime import engine\nfrom placement.cost import CostModel", set()),
        ("hybrid.formats.text", "from hybrid.errors import InputError\nfrom hybrid.model import ffn", {"hybrid.model"}),
        ("hybrid.runtime.gpu.step", "from hybrid.runtime.sampling import not_numbers", set()),
        ("hybrid.chat.repl", "from hybrid import commands", {"hybrid"}),
        ("hybrid.cli", "import tests.fake_chat", {"tests"}),
        ("tests.fake_chat", "import hybrid, gpu_kernels, scripts", {"scripts"}),
    ],
)
def test_the_order_itself(module, source, expected):
    assert forbidden_imports(module, ast.parse(source)) == expected


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []
    assert sorted(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == ["b", "c"]


def test_no_modules_import_each_other_in_a_circle():
    arrows = {}
    for path in SOURCES:
        module = module_of(path)
        home = module if path.stem == "__init__" else module.rpartition(".")[0]
        names = imported_modules(ast.parse(path.read_text(encoding="utf-8")), home, MODULES) & MODULES
        # `from placement import x` takes x from the module that the package has it from.
        arrows[module] = names - {module}
    assert circle(arrows) == []


def test_tests_lie_where_what_they_test_lies():
    rooms = {path.relative_to(ROOT / "tests").parent.as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    places = {".", "scripts"} | {room.removeprefix("hybrid.").replace(".", "/") for room in MAY_IMPORT}
    assert rooms <= places


def test_bare_except_is_found():
    assert bare_excepts(ast.parse("try:\n    f()\nexcept:\n    pass")) == [3]
    assert bare_excepts(ast.parse("try:\n    f()\nexcept OSError:\n    pass")) == []


@every_source
def test_source_file(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert forbidden_imports(module_of(path), tree) == set(), "imports against the order"
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
