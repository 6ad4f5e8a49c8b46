"""Messages as callers give them: those that are none are refused with the form that is expected."""

import pytest

from hybrid.errors import InputError
from hybrid.formats.messages import MAX_CHARACTERS, check_messages, check_roles

FORM = r'expected a list such as \[{"role": "user", "content": "Hello"}\]'


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("Hello there", "the conversation is of type str"),
        (b"Hello", "the conversation is of type bytes"),
        (None, "the conversation is None"),
        ({"role": "user", "content": "x"}, "the conversation is of type dict"),
        (iter([]), "the conversation is of type list_iterator"),
        (["Hello"], "message 0 is of type str"),
        ([("user", "Hello")], "message 0 is of type tuple"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "message 1 has no 'content'"),
        ([{"content": "x"}], "message 0 has no 'role'"),
        ([{"role": 1, "content": "x"}], "the role of message 0 is of type int"),
        ([{"role": "user", "content": None}], "the content of message 0 is None"),
        ([{"role": "user", "content": b"x"}], "the content of message 0 is of type bytes"),
        ([{"role": "user", "content": 5}], "the content of message 0 is of type int"),
        ([{"role": "user", "content": {"text": "x"}}], "the content of message 0 is of type dict"),
    ],
)
def test_what_are_no_messages(messages, found):
    with pytest.raises(InputError, match=f"^{found}, {FORM}$"):
        check_messages(messages)


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image_url", "image_url": {}}, "has the type 'image_url'"),
        ({"type": "text"}, "has the type 'text'"),
        ({"text": "x"}, "is no text"),
        ("x", "is no text"),
    ],
)
def test_parts_that_are_no_text(part, found):
    with pytest.raises(InputError, match=f'a part of message 0 {found}; only {{"type": "text"'):
        check_messages([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])


def test_messages_stay_as_they_are_and_parts_become_lines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = ({"role": "user", "content": parts}, {"role": "assistant", "content": "", "thinking": "t"})
    assert check_messages(given) == [{"role": "user", "content": "a\nb"}, given[1]]
    assert given[0]["content"] is parts
    assert check_messages([]) == []


def test_a_conversation_longer_than_any_context():
    with pytest.raises(InputError, match=r"have 16,777,217 characters, at most 16,777,216 are taken"):
        check_messages([{"role": "user", "content": "x" * MAX_CHARACTERS}, {"role": "user", "content": "x"}])


def test_a_role_that_the_template_does_not_name():
    tool = [{"role": "tool", "content": "x"}]
    check_roles(tool, "{% if m.role == 'tool' %}")
    check_roles([{"role": role, "content": "x"} for role in ("system", "user", "assistant")], "")
    for source in ("{{ m.role }}", "{% if m.role == 'toolbox' %}"):
        with pytest.raises(InputError, match=r"message 0 is 'tool', .* expected one of system, user, assistant"):
            check_roles(tool, source)
