"""How torch's threads wait, seen by what OpenMP itself says as it is loaded, and how many they are."""

import os
import re
import subprocess
import sys

import pytest
import torch

from hybrid import cli
from profiler.common import openmp
from profiler.common.openmp import passive_waits, torch_threads


def test_threads_of_a_torch_that_the_engines_room_imports_sleep_and_no_setting_is_left():
    told = {name: value for name, value in os.environ.items() if name not in openmp._SETTINGS}
    script = "import os, hybrid.runtime; print(os.environ.get('OMP_WAIT_POLICY'))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=told | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=True
    )
    spins = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if spins is None:
        pytest.skip("this torch does not use GCC's OpenMP")
    assert (spins[1], done.stdout.strip()) == ("0", "None")


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    for name in openmp._SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("users", "inside"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"KMP_BLOCKTIME": "5"}, None)],
)
def test_the_setting_is_there_inside_only(users, inside, no_torch, monkeypatch):
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), passive_waits():
        assert os.environ.get("OMP_WAIT_POLICY") == inside
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_nothing_is_set_where_torch_was_imported_before(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with passive_waits():
        assert "OMP_WAIT_POLICY" not in os.environ


def test_commands_import_torch_inside(no_torch, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.cli, "invoke", lambda context: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert seen == ["PASSIVE"] and not left.value.code and "OMP_WAIT_POLICY" not in os.environ


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
