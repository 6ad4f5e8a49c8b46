"""How torch's threads wait, seen by what OpenMP itself says as it is loaded, and how many they are."""

import os
import re
import subprocess
import sys

import pytest
import torch

from hybrid import cli
from profiler.common import openmp
from profiler.common.openmp import short_spins, torch_threads


def test_threads_of_a_torch_that_the_engines_room_imports_soon_sleep_and_no_setting_is_left():
    told = {name: value for name, value in os.environ.items() if name not in openmp._USERS}
    script = "import os, hybrid.runtime; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=told | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    spins = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if spins is None:
        pytest.skip("this torch does not use GCC's OpenMP")
    assert (spins[1], done.stdout.strip()) == ("5000", "None")


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    for name in openmp._USERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("users", "inside"), [({}, "5000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_the_setting_is_there_inside_only_and_a_users_own_stands(users, inside, no_torch, monkeypatch):
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), short_spins():
        assert os.environ.get("GOMP_SPINCOUNT") == inside
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_nothing_is_set_where_torch_was_imported_before(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with short_spins():
        assert "GOMP_SPINCOUNT" not in os.environ


def test_commands_import_torch_inside(no_torch, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.cli, "invoke", lambda context: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert seen == ["5000"] and not left.value.code and "GOMP_SPINCOUNT" not in os.environ


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
