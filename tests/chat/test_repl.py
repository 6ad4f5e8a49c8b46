"""The chat loop over a fake model and a scripted terminal: turns, the full context, Ctrl-C, errors."""

import json
import signal

import pytest
from fake_chat import FakeModel, ScriptedTerminal, chat, contents

from hybrid.chat.repl import run_repl
from hybrid.generation import GenerationStats, GenerationStep, SamplingSettings

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
    assert "stopped before the answer began; the conversation is as it was" in terminal.of("notice")


def test_an_interrupt_while_the_prompt_is_counted_stops_the_answer():
    model = FakeModel()
    count = model.count_tokens

    def press(messages):
        if messages[-1]["content"] == "long":
            signal.raise_signal(signal.SIGINT)
        return count(messages)

    model.count_tokens = press
    _, terminal = chat("a", "long", "b", model=model)
    assert terminal.answers == "echo: a\necho: b\n"
    assert contents(model.prompts[-1]) == ["a", "echo: a", "b"]


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
