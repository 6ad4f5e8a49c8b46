"""Where a user's caches are, and that a user may have none."""

import pwd

import pytest

from cpu_kernels import compiled
from cpu_kernels.folders import user_cache


def no_entry(uid):
    raise KeyError(uid)


@pytest.fixture
def homeless(monkeypatch):
    """A user as a container has him: HOME is unset, and nobody has his number."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


def test_the_cache_is_xdgs_or_below_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in ((tmp_path / "x", tmp_path / "x"), ("", tmp_path / ".cache"), ("x", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(value))
        assert user_cache() == expected


def test_a_user_without_a_home_has_no_cache(homeless):
    assert user_cache() is None
    assert [folder.name for folder in compiled._folders()] == ["__pycache__"]
