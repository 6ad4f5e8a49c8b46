"""What commands print, and where they find the corpus that nobody named."""

import numba
import pytest

from hybrid import console
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


@pytest.mark.parametrize(
    ("done", "lines"),
    [
        (
            0,
            [
                "work: 1,000 tokens",
                "work: 25%, 10 s, 25 tokens/s, 30 s left",
                "work: 50%, 20 s, 25 tokens/s, 20 s left",
            ],
        ),
        (500, ["work: 1,000 tokens, 500 of them kept", "work: 75%, 10 s, 25 tokens/s, 10 s left"]),
    ],
)
def test_progress_has_rate_and_time_left_of_what_is_done_here(done, lines, monkeypatch, capfd):
    now = 100.0
    monkeypatch.setattr(console, "monotonic", lambda: now)
    with progress("work", 1000, done=done) as advance:
        for _ in range((1000 - done) // 125):
            now += 5
            advance(125)
    said = capfd.readouterr().err.splitlines()
    assert said[: len(lines)] == lines and said[-1] == f"work: done in {(1000 - done) // 25} s"


@pytest.mark.parametrize(
    ("unit", "count", "rate"),
    [("layer", 1, "0.33 layers"), ("byte", 3 << 20, "1.0 MiB"), ("token", 3000, "1,000 tokens")],
)
def test_rates_have_the_digits_that_people_read(unit, count, rate, monkeypatch, capfd):
    now = 0.0
    monkeypatch.setattr(console, "monotonic", lambda: now)
    with progress("train", 4 * count, unit) as advance:
        now += 3
        advance(count)
    assert f"train: 25%, 3 s, {rate}/s, 9 s left" in capfd.readouterr().err


@pytest.mark.parametrize("named", [(), ("mine.txt",)])
def test_a_copy_of_the_embedded_model_has_its_corpus(named, tmp_path):
    copy = tmp_path / "copy"
    copy.symlink_to(EMBEDDED_MODEL, target_is_directory=True)
    found = _corpus(Project(copy, None, 1, progress), {"corpus": named}, "heldout.jsonl")
    assert found == (named or (EMBEDDED_CORPUS / "heldout.jsonl",))
