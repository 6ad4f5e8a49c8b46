"""Where a model's artefacts are."""

import os
import pwd
from dataclasses import replace

import pytest
from placement_cases import small_spec

from hybrid.formats.bundle import Bundle

SPEC = replace(small_spec(), fingerprint="0123456789abcdef")


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """The folder of a model that cannot be written."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    return tmp_path


def test_artefacts_of_a_read_only_model_are_in_the_users_cache(read_only, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(Bundle.of(read_only, SPEC).path) == "/caches/hybrid/0123456789abcdef"


def test_a_user_without_a_home_has_them_in_the_model(read_only, monkeypatch):
    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert Bundle.of(read_only, SPEC).path == read_only / "hybrid"
