"""The messages of a conversation, as a caller gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.errors import InputError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
MAX_CHARACTERS = 2**24  # of all messages, or of a prompt: far more text than any context holds
_FORM = 'expected a list such as [{"role": "user", "content": "Hello"}]'


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages, each with its `role` and its `content` as text; what else a message has stays as it is.

    A content may be a list of parts as in other interfaces, {"type": "text", "text": ...}, which become lines of one
    text. Raises `InputError` for anything else, saying what was found and the form that is expected.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InputError(f"the conversation is {_kind(messages)}, {_FORM}")
    checked = [_checked(f"message {number}", message) for number, message in enumerate(messages)]
    characters = sum(len(message["content"]) for message in checked)
    if characters > MAX_CHARACTERS:
        raise InputError(f"the messages have {characters:,} characters, at most {MAX_CHARACTERS:,} are taken; cut them")
    return checked


def check_roles(messages: Sequence[Message], source: str) -> None:
    """Raise `InputError` for a role that is unusual and that the chat template `source` does not name.

    A template leaves such a message out, or makes of the role a marker that the model never saw.
    """
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and f"'{role}'" not in source and f'"{role}"' not in source:
            raise InputError(
                f"the role of message {number} is {role[:60]!r}, which the model's chat template does not name; "
                f"expected one of {', '.join(ROLES)}"
            )


def _checked(name: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{name} is {_kind(message)}, {_FORM}")
    for field in ("role", "content"):
        if field not in message:
            raise InputError(f"{name} has no {field!r}, {_FORM}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise InputError(f"the role of {name} is {_kind(role)}, {_FORM}")
    if isinstance(content, list | tuple):
        content = "\n".join(_part(name, part) for part in content)
    if not isinstance(content, str):
        raise InputError(f"the content of {name} is {_kind(content)}, {_FORM}")
    return {**message, "content": content}


def _part(name: str, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"has the type {str(part['type'])[:60]!r}" if isinstance(part, Mapping) and "type" in part else "is no text"
    raise InputError(f'a part of {name} {found}; only {{"type": "text", "text": "..."}} is taken')


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
