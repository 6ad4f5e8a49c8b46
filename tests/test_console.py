"""What commands print, and where they find the corpus that nobody named."""

import numba
import pytest

from hybrid.commands import _corpus
from hybrid.console import compile_notice, counted, progress
from hybrid.formats.bundle import EMBEDDED_CORPUS, EMBEDDED_MODEL
from hybrid.offline.project import Project


def test_counted():
    assert [counted(number, "thread") for number in (0, 1, 1200)] == ["0 threads", "1 thread", "1,200 threads"]


def test_waiting_for_the_compiler_is_said_once(capfd):
    doubled = numba.njit(lambda x: x + x)
    with compile_notice():
        assert capfd.readouterr().err == ""
        assert doubled(1) == 2 and doubled(1.5) == 3
        assert capfd.readouterr().err == "compiling kernels (once)\n"
    with compile_notice():
        doubled(1)
    assert doubled(1j) == 2j  # outside
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("named", [(), ("mine.txt",)])
def test_a_copy_of_the_embedded_model_has_its_corpus(named, tmp_path):
    copy = tmp_path / "copy"
    copy.symlink_to(EMBEDDED_MODEL, target_is_directory=True)
    found = _corpus(Project(copy, None, 1, progress), {"corpus": named}, "heldout.jsonl")
    assert found == (named or (EMBEDDED_CORPUS / "heldout.jsonl",))
