"""`import hybrid` as a library: its names, what hides its neighbours, the errors, and the types."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hybrid
from hybrid import errors
from profiler.common.errors import HybridError

ROOT = Path(hybrid.__file__).parents[1]
PACKAGES = ("hybrid", "profiler", "predictor", "placement", "cpu_kernels", "gpu_kernels")
PUBLIC = ["AsyncEngine", "Engine", "EngineConfig", "GenerationStats", "GenerationStep", "Request", "SamplingSettings"]
PUBLIC += ["ServingConfig", "__version__", "errors"]


def script(folder, text):
    """Run a user's script, which lies in `folder`."""
    (folder / "run.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True, env=environment)


def test_the_public_names_are_listed():
    assert sorted(PUBLIC) == dir(hybrid)
    assert all(getattr(hybrid, name) is not None for name in PUBLIC)


@pytest.mark.parametrize("name", ["profiler.py", "placement/__init__.py"])
def test_a_users_file_that_hides_a_package_is_named(name, tmp_path):
    hiding = tmp_path / name
    hiding.parent.mkdir(exist_ok=True)
    hiding.write_text("def mine(): pass\n")
    done = script(tmp_path, "from hybrid import Engine")
    assert done.returncode == 1
    package = name.removesuffix(".py").removesuffix("/__init__")
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {hiding} hides the package {package!r} that hybrid needs; give it another name"
    )


def test_a_users_own_module_that_is_imported_already_is_named_too(tmp_path):
    done = script(
        tmp_path, "import sys, types\nsys.modules['predictor'] = types.ModuleType('predictor')\nimport hybrid"
    )
    assert done.returncode == 1
    assert "a module without a file hides the package 'predictor'" in done.stderr.splitlines()[-1]


def test_files_of_other_names_are_nobodys_business(tmp_path):
    (tmp_path / "profile.py").write_text("def mine(): pass\n")
    (tmp_path / "profiler").mkdir()  # without __init__.py: found after ours
    done = script(tmp_path, "import hybrid\nprint(hybrid.errors.InputError)")
    assert done.stdout == "<class 'hybrid.errors.InputError'>\n", done.stderr


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_called_what_they_are_imported_as(name):
    kind = getattr(errors, name)
    assert issubclass(kind, HybridError)
    assert f"{kind.__module__}.{kind.__qualname__}" == f"hybrid.errors.{name}"
    error = pickle.loads(pickle.dumps(kind("no", setting="threads")))
    assert (type(error), str(error), error.setting) == (kind, "no", "threads")
    assert kind("no").setting is None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
