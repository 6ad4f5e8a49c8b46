"""What commands take from files and standard input."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from powerinfer_cases import prepared

from hybrid import commands, reports
from hybrid.commands import _read_prompt
from hybrid.errors import InputError
from hybrid.offline.export import ExportResult, export
from hybrid.offline.project import Project
from predictor.report import Quality
from profiler.common.progress import no_progress


@pytest.mark.parametrize(
    ("data", "text"), [(b"a\n\n", "a\n"), (b"\xef\xbb\xbfa\r\n", "a"), ("日\n本".encode(), "日\n本"), (b"", "")]
)
def test_a_prompt_is_a_files_text_without_its_last_newline(data, text, tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes(data)
    assert _read_prompt(tmp_path / "p") == text
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert _read_prompt(Path("-")) == text


def test_no_more_is_read_of_a_prompt_than_any_context_holds(tmp_path, monkeypatch):
    with (tmp_path / "p").open("wb") as file:
        file.truncate(2**30)
    endless = SimpleNamespace(buffer=io.BufferedReader(Endless()))
    monkeypatch.setattr(sys, "stdin", endless)
    for path in (tmp_path / "p", Path("-")):
        with pytest.raises(InputError, match=r"has more than 16,777,216 bytes; give a shorter text"):
            _read_prompt(path)


class Endless(io.RawIOBase):
    """Gives letters for ever."""

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = b"a" * len(buffer)
        return len(buffer)


@pytest.mark.parametrize(("name", "message"), [("none", "cannot read the prompt"), ("", "Is a directory")])
def test_a_prompt_that_cannot_be_read(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        _read_prompt(tmp_path / name)


def test_a_prompt_that_is_no_text(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        _read_prompt(tmp_path / "p")


def test_an_export_says_what_predictors_without_biases_cost(monkeypatch, capsys, tmp_path):
    before = Quality("all", 9, 100, 0.95, 0.85, 0.2, 0.1, 0.0064)
    after = Quality("all", 11, 120, 0.94, 0.84, 0.21, 0.1, 0.0071)
    result = ExportResult(tmp_path / "m.powerinfer.gguf", 2**20, before, after, 0.0049, hot=0)
    monkeypatch.setattr(commands, "_project", lambda model, options: SimpleNamespace(require_sparse=lambda: None))
    monkeypatch.setattr(commands, "export_powerinfer", lambda project, out, kind, progress: result)
    commands.export(tmp_path, tmp_path / "out", "f16", {})
    said = capsys.readouterr()
    assert said.out == (
        "predictors         rank  recall  precision  ratio  missed mass\n"
        "ours                  9   95.0%      85.0%   2.00        0.64%\n"
        "PowerInfer's form    11   94.0%      84.0%   2.10        0.71%\n"
        "perplexity of the latter against dense: +0.49%\n"
    )
    assert "note: the placement has no hot neurons" in said.err and f"wrote {result.model}, 1.0 MiB in f16" in said.err


def test_a_powerinfer_file_is_prepared_by_what_came_with_it(capsys, tmp_path):
    pytest.importorskip("transformers")
    path = export(prepared(tmp_path / "m"), tmp_path / "out", "f16", no_progress).model
    options = {"corpus": (), "bundle": None, "vram_budget": "1GiB", "context": None, "solver": "greedy"}
    commands.prepare(path, options | {"hardware": "default"})
    project = Project(path, None, 1, no_progress)
    placement, bank = project.bundle.load_placement(project.spec), project.load_predictors()
    made = placement.made_from
    assert (made["strategy"], made["predictors"], made["vram_budget"]) == ("learned", bank.header.key, 2**30)
    assert "profile, train: what came with the file; with --corpus FILE... made anew" in capsys.readouterr().err
    commands.prepare(path, options | {"hardware": "default"})
    assert "place: present and current" in capsys.readouterr().err
    reports.inspect(path, None)
    shown = capsys.readouterr().out
    assert shown.count("came with m.powerinfer.gguf") == 2 and "rank 4 to 6, no report" in shown
