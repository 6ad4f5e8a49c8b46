"""The chat loop over a fake model and a scripted terminal: turns, the full context, Ctrl-C, errors, every command."""

import json
import signal

import pytest
from fake_chat import FakeModel, ScriptedTerminal

from hybrid.chat.repl import COMMANDS, run_repl
from hybrid.generation import GenerationStats, GenerationStep, SamplingSettings


def chat(*lines, model=None, interactive=True, system=None, **settings):
    """Run the loop over `lines`; returns the model and the terminal, which say what happened."""
    model = model or FakeModel()
    terminal = ScriptedTerminal(lines, interactive)
    run_repl(model, terminal, SamplingSettings(**settings), system)
    return model, terminal


def contents(messages):
    return [message["content"] for message in messages]


# Turns


def test_an_answer_is_streamed_and_the_next_prompt_carries_both_messages():
    model, terminal = chat("one two", "  ", "three", system="be brief")
    assert terminal.answers == "echo: one two\necho: three\n"
    assert model.prompts == [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}],
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one two"},
            {"role": "assistant", "content": "echo: one two"},
            {"role": "user", "content": "three"},
        ],
    ]
    assert model.closed == 2


def test_after_each_answer_one_line_of_counters():
    _, terminal = chat("a", "b c")
    assert [line.split(" |")[0] for line in terminal.of("notice")] == ["2 tokens", "3 tokens"]


def test_the_header_comes_first():
    terminal = ScriptedTerminal([])
    run_repl(FakeModel(), terminal, SamplingSettings(), header="tiny model")
    assert terminal.shown == [("notice", "tiny model")]


def test_a_multi_line_message_is_one_message():
    model, _ = chat("one\ntwo")
    assert contents(model.prompts[0]) == ["one\ntwo"]


def test_the_counters_fit_the_window_and_can_be_switched_off():
    terminal = ScriptedTerminal(["a b", "/set stats off", "c", "/set stats", "/set stats ON", "d"])
    terminal.columns = 40
    run_repl(FakeModel(), terminal, SamplingSettings())
    assert terminal.of("notice") == ["3 tokens | 2.0 tok/s | TTFT 250 ms", "2 tokens | 2.0 tok/s | TTFT 250 ms"]
    assert terminal.of("info") == ["stats off", "stats off", "stats on"]


def test_an_empty_answer_is_kept_and_said_to_be_empty():
    model, terminal = chat("silent", "next")
    assert contents(model.prompts[1]) == ["silent", "", "next"]
    assert terminal.answers == "echo: next\n"
    assert terminal.of("notice")[0] == "the answer is empty; /regen asks again, /undo removes it"


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_answer_without_a_word_is_empty_whatever_ends_it(text):
    model = FakeModel()
    step = GenerationStep(text, 0, GenerationStats(1, generated_tokens=1), "length")
    model.reply = lambda messages, settings, progress: (item for item in [step])
    _, terminal = chat("a", model=model, max_new_tokens=1)
    empty, early, _ = terminal.of("notice")
    assert empty.startswith("the answer is empty") and early == "the answer ends here: max_new_tokens is 1"


def test_how_far_the_prompt_is_read_is_shown_until_the_answer_begins():
    _, terminal = chat("w " * 24)
    assert terminal.statuses[:4] == [*(f"reading the prompt: {done} of 25 tokens" for done in (0, 10, 20)), ""]
    _, terminal = chat("hang " * 24, "hang")
    assert terminal.statuses[-1] == ""


def test_a_leading_space_sends_a_message_that_begins_with_a_slash():
    model, _ = chat(" /etc/hosts")
    assert contents(model.prompts[0]) == ["/etc/hosts"]


def test_the_answer_that_reaches_the_limit_says_so():
    _, terminal = chat("a b c d", max_new_tokens=2)
    assert "the answer ends here: max_new_tokens is 2" in terminal.of("notice")


# Errors


def test_an_error_in_a_turn_is_one_line_and_the_chat_goes_on():
    model, terminal = chat("fail", "next")
    assert terminal.of("error") == ["error: the CPU workers died; start again"]
    assert terminal.answers == "echo:\necho: next\n"
    assert contents(model.prompts[1]) == ["next"]
    assert model.closed == 2


# A context that fills


def test_the_oldest_exchanges_are_dropped_visibly_and_the_system_prompt_stays():
    # Each exchange takes 2 + 3 tokens, the system prompt 2, the reserve is a quarter of 20.
    model, terminal = chat("a", "b", "c", "d", model=FakeModel(context=20), system="s")
    assert contents(model.prompts[2]) == ["s", "a", "echo: a", "b", "echo: b", "c"]
    assert contents(model.prompts[3]) == ["s", "b", "echo: b", "c", "echo: c", "d"]
    assert terminal.of("notice")[3] == "dropped the oldest 2 messages to fit the context of 20 tokens"


def test_a_small_answer_needs_only_a_small_reserve():
    model, _ = chat("a", "b", "c", "d", model=FakeModel(context=20), system="s", max_new_tokens=1)
    assert contents(model.prompts[3])[1] == "a"


def test_a_message_that_alone_is_too_long_is_refused_and_drops_nothing():
    long = "w " * 30
    model, terminal = chat("a", long, "b", model=FakeModel(context=20))
    assert terminal.of("error") == [
        "error: the message takes 31 tokens with its system prompt, the context holds 20 and an answer needs some; "
        "shorten it"
    ]
    assert contents(model.prompts[1]) == ["a", "echo: a", "b"]
    assert not [line for line in terminal.of("notice") if "dropped" in line]


@pytest.mark.parametrize(("words", "answered"), [(18, True), (19, False)])
def test_the_longest_message_leaves_one_token_for_the_answer(words, answered):
    model, terminal = chat("w " * words, model=FakeModel(context=20))
    assert (len(model.prompts) == 1) is answered
    assert (terminal.of("error") == []) is answered


def test_an_answer_that_meets_the_end_of_the_context_says_so():
    _, terminal = chat("a " * 15, model=FakeModel(context=20))
    assert "the answer ends here: the context of 20 tokens is full" in terminal.of("notice")


# Ctrl-C


def test_an_interrupted_answer_is_kept_and_marked(tmp_path):
    path = tmp_path / "chat.json"
    model, terminal = chat("interrupt", f"/save {path}", "next")
    assert terminal.answers == "echo: interrupt\necho: next\n"
    saved = json.loads(path.read_text())["messages"]
    assert saved[1] == {"role": "assistant", "content": "echo: interrupt", "partial": True}
    assert contents(model.prompts[1]) == ["interrupt", "echo: interrupt", "next"]


def test_an_interrupt_before_the_first_token_leaves_the_conversation_as_it_was():
    model, terminal = chat("a", "hang", "b")
    assert contents(model.prompts[2]) == ["a", "echo: a", "b"]
    assert "stopped before the answer began; the conversation is as it was, without the message" in terminal.of(
        "notice"
    )


def test_a_hasty_second_interrupt_does_not_lose_the_chat():
    model = FakeModel()
    terminal = ScriptedTerminal(["slow", "next"])

    def press(text):
        if terminal.answers.startswith("no no no"):
            signal.raise_signal(signal.SIGINT)

    terminal.on_write = press  # presses again while the loop ends the line of the stopped answer
    run_repl(model, terminal, SamplingSettings())
    assert contents(model.prompts[1]) == ["slow", "no no no", "next"]
    assert model.closed == 2


def test_an_interrupt_that_something_below_swallows_still_stops_the_answer():
    model = FakeModel()
    terminal = ScriptedTerminal(["slow", "next"])

    def press(text):
        if terminal.answers == "no no":
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    terminal.on_write = press
    run_repl(model, terminal, SamplingSettings())
    assert contents(model.prompts[1]) == ["slow", "no no", "next"]


def test_an_interrupt_at_the_prompt_hints_and_goes_on():
    model, terminal = chat(KeyboardInterrupt(), "a")
    assert terminal.shown[0] == ("notice", "Ctrl-D or /exit leaves")
    assert len(model.prompts) == 1


@pytest.mark.parametrize("lines", [[KeyboardInterrupt(), "never"], ["interrupt", "never"], ["hang", "never"]])
def test_without_a_person_an_interrupt_ends_the_chat(lines):
    model = FakeModel()
    with pytest.raises(KeyboardInterrupt):
        chat(*lines, model=model, interactive=False)
    assert ["never"] not in [contents(prompt)[-1:] for prompt in model.prompts]


# Commands


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
