"""Conversations and their files: what is saved comes back, and nothing that is not a chat is read or overwritten."""

import json

import pytest

from hybrid.chat.conversation import FORMAT, Conversation, Message, load_conversation, read_text_file, save_conversation
from hybrid.errors import InputError
from hybrid.generation import SamplingSettings

CHAT = Conversation(
    "be brief",
    (
        Message("user", "one\ntwo"),
        Message("assistant", "grüße 😀"),
        Message("user", "three"),
        Message("assistant", "fo", partial=True),
    ),
)


def test_the_template_sees_roles_and_contents_with_the_system_prompt_first():
    assert CHAT.for_template()[:2] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
    ]
    assert Conversation().for_template() == []
    assert CHAT.for_template()[-1] == {"role": "assistant", "content": "fo"}


@pytest.mark.parametrize(("count", "left"), [(0, 4), (2, 2), (4, 0), (6, 0)])
def test_messages_are_dropped_from_either_end(count, left):
    assert CHAT.without_last(count).messages == CHAT.messages[:left]
    assert CHAT.without_first(count).messages == CHAT.messages[4 - left :]
    assert CHAT.without_first(count).system == "be brief"


@pytest.mark.parametrize("chat", [CHAT, Conversation()])
def test_what_is_saved_is_loaded(tmp_path, chat):
    settings = SamplingSettings(temperature=0, seed=5, stop=("\n\n", "é"))
    path = tmp_path / "chat.json"
    save_conversation(path, Conversation(), SamplingSettings())
    save_conversation(path, chat, settings, "tiny")
    assert load_conversation(path) == (chat, settings)
    assert json.loads(path.read_text())["model"] == "tiny"
    assert [item.name for item in tmp_path.iterdir()] == ["chat.json"]


def test_saving_does_not_overwrite_a_file_that_is_not_a_chat(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(InputError, match="is not a saved chat"):
        save_conversation(path, CHAT, SamplingSettings())
    assert path.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a folder or in no folder"):
        save_conversation(tmp_path / "file" / "chat.json", CHAT, SamplingSettings())


def _content(**changes):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"format": FORMAT, "system": None, "messages": messages, "settings": {}} | changes


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "has format None"),
        ({}, "has format None"),
        (_content(format="hybrid-chat-2"), "hybrid-chat-2"),
        (_content(system=3), "system prompt is int"),
        (_content(messages={}), "messages are not a list"),
        (_content(messages=[{"role": "user", "content": "a"}]), "each with its answer"),
        (_content(messages=[{"role": "assistant", "content": "a"}] * 2), "message 0"),
        (_content(messages=[{"role": "user", "content": "a"}] * 2), "message 1"),
        (_content(messages=[{"role": "user", "content": "\ud800"}] * 2), "message 0"),
        (_content(messages=["a", "b"]), "message 0"),
        (_content(settings={"heat": 1}), "settings are not known here: heat"),
        (_content(settings=[1]), "settings are not known"),
        (_content(settings={"temperature": "hot"}), "temperature is 'hot'"),
        (_content(settings={"stop": [1]}), "stop is"),
    ],
)
def test_a_damaged_chat_is_refused_in_one_line(tmp_path, content, found):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        load_conversation(path)
    assert found in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"\xff\xfe\x00", "not UTF-8"), (b"a\0b", "binary"), (b"[" * 10_000, "not JSON"), (b"", "not JSON")],
)
def test_a_file_that_is_no_json_is_refused(tmp_path, content, found):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=found):
        load_conversation(path)


def test_reading_a_text_file(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe\n")
    assert read_text_file(path) == "grüße\n"
    monkeypatch.setattr("hybrid.chat.conversation.MAX_FILE_BYTES", 3)
    with pytest.raises(InputError, match="has 11 bytes, at most 3"):
        read_text_file(path)


@pytest.mark.parametrize("name", ["", "missing", "x" * 5000])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="give the path of a text file"):
        read_text_file(tmp_path / name)
