"""Every command of the chat, over a fake model and a scripted terminal."""

import pytest
from fake_chat import FakeModel, ScriptedTerminal, chat, contents

from hybrid.chat.repl import COMMANDS, run_repl
from hybrid.generation import SamplingSettings


def test_exit_leaves_at_once():
    model, _ = chat("/exit", "a")
    assert model.prompts == []


def test_help_lists_every_command():
    _, terminal = chat("/help")
    (text,) = terminal.of("info")
    assert all(f"/{name}" in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("/hlep", ", the nearest is /help"),
        ("/saev x", ", the nearest is /save"),
        ("/EXIT", ", the nearest is /exit"),
        ("/quit", ", the nearest is /exit"),
        ("/foo", ""),
        ("/ exit", ""),
        ("/usr/bin/env", ""),
    ],
)
def test_an_unknown_command_names_the_nearest_if_one_is_near(typed, nearest):
    model, terminal = chat(typed, "a")
    assert terminal.of("error") == [f"error: unknown command {typed.split()[0]}{nearest}; /help lists all"]
    assert len(model.prompts) == 1


@pytest.mark.parametrize("typed", ["/clear all", "/exit now", "/save", "/load", "/read"])
def test_an_argument_too_many_or_too_few_is_one_line(typed):
    _, terminal = chat(typed)
    assert len(terminal.of("error")) == 1
    assert "argument" in terminal.of("error")[0]


def test_clear_forgets_the_messages_and_the_cache_and_keeps_system_and_settings():
    model, _ = chat("a", "/set top_k 3", "/clear", "b", system="s")
    assert contents(model.prompts[1]) == ["s", "b"]
    assert model.resets == 1
    assert model.settings[1].top_k == 3


def test_regen_answers_the_last_message_again():
    model, terminal = chat("a", "b", "/regen", "c")
    assert model.prompts[2] == model.prompts[1]
    assert contents(model.prompts[3]) == ["a", "echo: a", "b", "echo: b", "c"]
    assert terminal.answers.count("echo: b\n") == 2


def test_regen_that_gives_nothing_keeps_the_answer_before():
    model = FakeModel()
    terminal = ScriptedTerminal(["a", "/regen", "b"])
    reply, calls = model.reply, []

    def failing_second(messages, settings, progress):
        calls.append(messages)
        return reply([{"role": "user", "content": "hang"}] if len(calls) == 2 else messages, settings, progress)

    model.reply = failing_second
    run_repl(model, terminal, SamplingSettings())
    assert contents(calls[2]) == ["a", "echo: a", "b"]


def test_undo_removes_the_last_exchange():
    model, terminal = chat("a", "b\n" + "long " * 30, "/undo", "c")
    assert contents(model.prompts[2]) == ["a", "echo: a", "c"]
    removed = [line for line in terminal.of("notice") if line.startswith("removed")]
    assert len(removed) == 1 and "\n" not in removed[0] and len(removed[0]) < 90


@pytest.mark.parametrize("command", ["/undo", "/regen"])
def test_nothing_to_undo_or_to_regenerate(command):
    model, terminal = chat(command)
    assert len(terminal.of("error")) == 1
    assert model.prompts == []


def test_system_sets_shows_and_removes():
    model, terminal = chat("/system", "/system be\nbrief", "a", "/system", "/system none", "b")
    assert contents(model.prompts[0]) == ["be\nbrief", "a"]
    assert contents(model.prompts[1]) == ["a", "echo: a", "b"]
    assert terminal.of("info") == ["there is no system prompt; /system TEXT sets one", "be\nbrief"]


def test_set_changes_the_next_answer():
    model, terminal = chat("/set temperature 0", '/set stop ["\\n"]', "/set  seed\t4", "a")
    assert model.settings[0].greedy
    assert model.settings[0].stop == ("\n",)
    assert model.settings[0].seed == 4
    assert terminal.of("info")[0] == "temperature 0.0"


def test_set_alone_lists_all_and_with_a_name_one():
    _, terminal = chat("/set", "/set top_p")
    listing, one = terminal.of("info")
    assert [line.split()[0] for line in listing.splitlines()] == [*SamplingSettings.names(), "stats"]
    assert "seed none" in listing.splitlines() and "stats on" in listing.splitlines()
    assert one == "top_p 0.95"


@pytest.mark.parametrize("typed", ["/set heat", "/set heat 1", "/set top_p 2", "/set stats 1"])
def test_a_wrong_setting_changes_nothing(typed):
    model, terminal = chat(typed, "a")
    assert len(terminal.of("error")) == 1
    assert model.settings[0] == SamplingSettings()


def test_stats_before_and_after_an_answer():
    _, terminal = chat("/stats", "a", "/stats", "/clear", "/stats")
    before, after, cleared = terminal.of("info")
    assert before == cleared == "context: 0 of 1000 tokens, 0 messages"
    assert after.splitlines()[0] == "context: 5 of 1000 tokens, 2 messages"
    assert after.splitlines()[1:] == [
        "last prompt: 2 tokens, 0 of them from the KV cache",
        "last answer: 2 tokens | 2.0 tok/s | TTFT 250 ms | active 12.5% | hot 75.0%",
        "ms/token: predictor 100.0, attention 200.0, FFN 300.0, head 0.0",
    ]


def test_placement_is_shown():
    _, terminal = chat("/placement")
    assert terminal.of("info") == ["all hot\nno cold"]


def test_a_saved_chat_goes_on_in_another_run(tmp_path):
    path = tmp_path / "my chat.json"
    chat("a", "/set seed 3", f"/save {path}", system="s")
    model, _ = chat("old", f"/load {path}", "b")
    assert contents(model.prompts[1]) == ["s", "a", "echo: a", "b"]
    assert model.settings[1].seed == 3


def test_a_failed_load_leaves_the_conversation(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("{}")
    model, terminal = chat("a", f"/load {path}", f"/load {tmp_path}", "/load a\0b", "/load ~nobody-here/x", "b")
    assert len(terminal.of("error")) == 4
    assert contents(model.prompts[1]) == ["a", "echo: a", "b"]


def test_read_puts_files_before_the_next_message_only(tmp_path):
    (tmp_path / "one").write_text("first\n")
    (tmp_path / "two").write_text("second")
    model, _ = chat(f"/read {tmp_path / 'one'}", f"/read {tmp_path / 'two'}", "go", "on")
    assert contents(model.prompts[0]) == ["first\n\nsecond\n\ngo"]
    assert contents(model.prompts[1])[-1] == "on"


def test_files_stay_for_the_message_after_one_that_was_not_kept(tmp_path):
    (tmp_path / "file").write_text("first")
    model = FakeModel()
    reply = model.reply
    model.reply = lambda messages, settings, progress: reply(
        [{"role": "user", "content": "hang"}] if messages[-1]["content"].endswith("go") else messages,
        settings,
        progress,
    )
    chat(f"/read {tmp_path / 'file'}", "go", "on", "and on", model=model)
    assert [contents(prompt)[-1] for prompt in model.prompts] == ["hang", "first\n\non", "and on"]


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff", b"a\0", b"w " * 30])
def test_a_file_that_cannot_be_asked_about_is_refused_when_it_is_read(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    model, terminal = chat(f"/read {tmp_path / 'file'}", "a", model=FakeModel(context=20))
    assert len(terminal.of("error")) == 1
    assert contents(model.prompts[0]) == ["a"]


def test_clear_forgets_a_file_that_was_read(tmp_path):
    (tmp_path / "file").write_text("text")
    model, _ = chat(f"/read {tmp_path / 'file'}", "/clear", "a")
    assert contents(model.prompts[0]) == ["a"]
