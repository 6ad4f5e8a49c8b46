"""The drawing of the chat: piped input in a real process, and a person at a pseudo-terminal."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory

from hybrid.chat.screen import Screen
from hybrid.chat.terminal import CommandCompleter, PlainTerminal, open_history
from hybrid.errors import InputError

ROOT = Path(__file__).parents[2]
PROMPT = r">( |\x08\x1b\[2C)\S*\x1b\[\?25h|> $"  # as prompt_toolkit draws it, and on a dumb terminal
PROGRAM = str(ROOT / "tests" / "fake_chat.py")


def environment(data: Path, **changes: str) -> dict[str, str]:
    """The environment of a process under test: its own data folder, no questions to a terminal that cannot answer."""
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    own = {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(data), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    return kept | own | changes


# Piped


def piped(text: bytes, data: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, PROGRAM]
    return subprocess.run(command, input=text, capture_output=True, env=environment(data), timeout=60)


def test_piped_lines_are_answered_in_turn_with_nothing_but_answers_on_stdout(tmp_path):
    lines = ["hello there", "", "/system be brief", "/nope", "w " * 100, "gr\u00fc\u00dfe", "/set top_k"]
    result = piped("\r\n".join(lines).encode() + b"\n\xff\nbye", tmp_path)
    assert result.returncode == 0
    assert result.stdout.decode() == "echo: hello there\necho: gr\u00fc\u00dfe\ntop_k 40\necho: bye\n"
    shown = result.stderr.decode().splitlines()
    assert [line.split(":")[0] for line in shown if line.startswith("error")] == ["error"] * 3
    assert len([line for line in shown if "tok/s" in line]) == 3
    assert "\x1b" not in result.stderr.decode()


def test_a_byte_order_mark_before_piped_lines_is_no_part_of_them(tmp_path):
    assert piped(b"\xef\xbb\xbfhello\n", tmp_path).stdout == b"echo: hello\n"


def test_no_input_is_no_error(tmp_path):
    result = piped(b"", tmp_path)
    assert (result.returncode, result.stdout) == (0, b"")


def lines_of(source: bytes) -> PlainTerminal:
    return PlainTerminal(io.BytesIO(source), Screen(io.StringIO(), {}), Screen(io.StringIO(), {}))


def test_a_line_that_is_not_utf8_is_skipped_and_the_next_is_read():
    terminal = lines_of(b"a\xff\nb\r\n")
    with pytest.raises(InputError, match="byte 1"):
        terminal.read()
    assert terminal.read() == "b"
    with pytest.raises(EOFError):
        terminal.read()


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    terminal = lines_of(b"\xef\xbb\xbf/help\n\xef\xbb\xbfsecond\n")
    assert [terminal.read(), terminal.read()] == ["/help", "\ufeffsecond"]


# Parts of the drawing


def completions(text: str) -> list[str]:
    found = CommandCompleter().get_completions(Document(text), CompleteEvent(completion_requested=True))
    return [text[: len(text) + item.start_position] + item.text for item in found]


def test_completion_of_commands_settings_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.txt").touch()
    (tmp_path / "sub").mkdir()
    assert completions("/s") == ["/system ", "/set ", "/stats ", "/save "]
    assert completions("/set s") == ["/set seed ", "/set stop ", "/set stats "]
    assert completions("/set t") == ["/set temperature ", "/set top_k ", "/set top_p "]
    assert completions("/read my") == ["/read my notes.txt"]
    assert completions("/load su") == ["/load sub"]
    assert completions("/undo ") == []
    assert completions("/set top_k 4") == []
    assert completions("tell /s") == []


def test_history_is_kept_in_the_data_folder_for_its_owner_only(tmp_path):
    history = open_history({"XDG_DATA_HOME": str(tmp_path / "new")})
    history.append_string("a\nb")
    path = tmp_path / "new" / "hybrid" / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(open_history({"XDG_DATA_HOME": str(tmp_path / "new")}).load_history_strings()) == ["a\nb"]


def test_history_falls_back_to_memory(tmp_path):
    (tmp_path / "file").touch()
    assert isinstance(open_history({"XDG_DATA_HOME": str(tmp_path / "file")}), InMemoryHistory)


def test_a_relative_data_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    history = open_history({"XDG_DATA_HOME": "relative"})
    assert isinstance(history, FileHistory)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_full_disk_does_not_end_the_chat(tmp_path):
    history = open_history({"XDG_DATA_HOME": str(tmp_path)})
    (tmp_path / "hybrid" / "history").unlink()
    (tmp_path / "hybrid").rmdir()
    history.append_string("still here")
    assert history.get_strings() == ["still here"]


# A pseudo-terminal


@pytest.fixture
def person(tmp_path):
    """Starts the program under a pseudo-terminal, as a person would; everything started is ended after the test."""
    pexpect = pytest.importorskip("pexpect")
    started = []

    def start(columns: int = 80, command: str = "exec {program}", **changes: str):
        line = command.format(program=f"{sys.executable} {PROGRAM}")
        variables, size = environment(tmp_path, **changes), (24, columns)
        child = pexpect.spawn(
            "/bin/sh", ["-c", line], env=variables, encoding="utf-8", timeout=10, cwd=tmp_path, dimensions=size
        )
        started.append(child)
        child.expect("fake model")
        child.expect(PROMPT)
        return child

    yield start
    for child in started:
        child.close(force=True)


def leave(child) -> None:
    """Press Ctrl-D at the next prompt and check that the program ends well."""
    child.expect(PROMPT)
    time.sleep(0.2)  # a dumb terminal shows the prompt before prompt_toolkit has switched the line discipline
    child.sendcontrol("d")
    child.expect(pytest.importorskip("pexpect").EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_person_types_and_leaves(person):
    child = person()
    child.send("hello there\r")
    child.expect("echo: hello there\r\n")
    child.expect("\x1b\\[2m3 tokens .*\x1b\\[0m\r\n")
    leave(child)


def test_enter_sends_and_three_ways_make_a_new_line(person):
    child = person()
    child.send("one\x1b\rtwo\\\rthree")
    child.send("\x1b[200~ four\nfive\x1b[201~")
    child.send("\r")
    child.expect("echo: one two three four five\r\n")
    leave(child)


def test_tab_completes_commands_and_setting_names(person):
    child = person()
    child.send("/pl\t\r")
    child.expect("all hot\r\nno cold")
    child.send("/set max\t3\r")
    child.expect("max_new_tokens 3\r\n")
    leave(child)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(person):
    child = person()
    child.send("slow\r")
    child.expect("no no no")
    child.kill(signal.SIGINT)
    child.kill(signal.SIGINT)
    child.expect("stopped; the partial answer is kept")
    child.expect(PROMPT)
    child.send("next\r")
    child.expect("echo: next\r\n")
    child.send("/stats\r")
    child.expect("4 messages")
    leave(child)


def test_the_ctrl_c_key_stops_the_answer(person):
    child = person()
    child.send("slow\r")
    child.expect("no no no")
    child.sendintr()
    child.expect("stopped; the partial answer is kept")
    leave(child)


def test_ctrl_c_clears_what_was_typed_and_hints_when_there_is_nothing(person):
    child = person()
    child.send("wrong")
    child.expect("wrong")
    child.sendintr()
    child.send("right\r")
    child.expect("echo: right\r\n")
    assert "leaves" not in child.before
    child.expect(PROMPT)
    child.sendintr()
    child.expect("Ctrl-D or /exit leaves")
    leave(child)


def test_what_is_typed_or_pasted_during_an_answer_is_not_shown_in_it_but_is_the_next_message(person):
    child = person()
    child.send("slow\r")
    child.expect("no no no")
    assert child.before.rindex("\x1b[?2004h") > child.before.rindex("\x1b[?2004l")  # pastes are marked
    child.send("typed\x1b\rahead\r")
    child.send("\x1b[200~pasted\nlines\x1b[201~\r")
    child.expect("the context of 60 tokens is full")
    assert "typed" not in child.before and "pasted" not in child.before
    child.expect("echo: typed ahead\r\n")
    child.expect("echo: pasted lines\r\n")
    leave(child)


def test_words_and_counters_fit_the_window_also_when_it_changes(person):
    child = person(columns=40)
    child.send("an answer that is longer than the window of this person\r")
    child.expect("echo: an answer that is longer than the\r\nwindow of this person\r\n")
    child.expect("\x1b\\[2m12 tokens \\| 2.0 tok/s \\| TTFT 250 ms\x1b\\[0m\r\n")
    child.expect(PROMPT)
    child.setwinsize(24, 30)
    child.send("an answer that is longer than it\r")
    child.expect("echo: an answer that is longer\r\nthan it\r\n")
    leave(child)


def test_ctrl_z_during_an_answer_leaves_the_terminal_as_it_was_found(person):
    child = person(command="set -m; {program}; stty -a; fg")
    child.send("slow\r")
    child.expect("no no no")
    child.sendcontrol("z")
    child.expect(" icanon .* echo ")
    child.expect("(no ){5}")
    child.send("hidden\r")
    child.expect("the context of 60 tokens is full")
    assert "hidden" not in child.before
    child.expect("echo: hidden\r\n")
    leave(child)


def test_history_comes_back_in_the_next_run(person):
    child = person()
    child.send("remember me\r")
    child.expect("echo: remember me\r\n")
    leave(child)
    child = person()
    child.send("\x1b[A\r")
    child.expect("echo: remember me\r\n")
    leave(child)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colour_the_same_is_shown(person, variables):
    child = person(**variables)
    child.send("hello\r")
    child.expect("echo: hello\r\n2 tokens ")
    leave(child)
