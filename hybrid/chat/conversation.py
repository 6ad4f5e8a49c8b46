"""A conversation: the system prompt and the messages, and the JSON file that keeps them.

Conversations are immutable. A turn builds the next one and replaces the old one at the end, so that an error or a
Ctrl-C in between leaves the conversation as it was.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hybrid.errors import ArtifactError, InputError
from hybrid.generation import SamplingSettings
from profiler.common.artifact import atomic_write

FORMAT = "hybrid-chat-1"
MAX_FILE_BYTES = 16 * 2**20  # far more text than any context holds


@dataclass(frozen=True)
class Message:
    """What one side said; `partial` marks an answer that the user stopped."""

    role: Literal["user", "assistant"]
    content: str
    partial: bool = False


@dataclass(frozen=True)
class Conversation:
    """The system prompt, if any, and the messages: user and assistant in turn, the user first."""

    system: str | None = None
    messages: tuple[Message, ...] = ()

    def for_template(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them: dicts of `role` and `content`, the system prompt first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [{"role": message.role, "content": message.content} for message in self.messages]

    def with_message(self, message: Message) -> Conversation:
        """This conversation with `message` at its end."""
        return replace(self, messages=(*self.messages, message))

    def without_last(self, count: int) -> Conversation:
        """This conversation without its last `count` messages; all are dropped if it has fewer."""
        return replace(self, messages=self.messages[: max(len(self.messages) - count, 0)])

    def without_first(self, count: int) -> Conversation:
        """This conversation without its first `count` messages; the system prompt stays."""
        return replace(self, messages=self.messages[count:])


def save_conversation(
    path: Path, conversation: Conversation, settings: SamplingSettings, model_name: str | None = None
) -> None:
    """Write the conversation and the settings to the JSON file `path`, atomically; an earlier chat there is replaced.

    Raises `InputError` when `path` holds something else than a chat, or cannot be written.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path} is a folder or in no folder; give the path of a file in a folder that exists")
    if os.path.exists(path):
        try:
            load_conversation(path)
        except InputError as error:
            raise InputError(f"{path} exists and is not a saved chat; choose another name") from error
    content = {
        "format": FORMAT,
        "model": model_name,
        "system": conversation.system,
        "messages": [asdict(message) for message in conversation.messages],
        "settings": asdict(settings),
    }
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except ArtifactError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise InputError(f"cannot write {path}: {reason}; choose another folder") from error


def load_conversation(path: Path) -> tuple[Conversation, SamplingSettings]:
    """Read what `save_conversation` wrote; raises `InputError` when `path` is not a chat that can be continued."""
    text = read_text_file(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON; expected a chat written by /save") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise InputError(f"{path} has format {found!r}, expected {FORMAT!r}: a chat written by /save of this version")
    try:
        return _parse_conversation(content), _parse_settings(content)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}; nothing was loaded") from error


def read_text_file(path: Path) -> str:
    """The UTF-8 text of a regular file of at most `MAX_FILE_BYTES`; raises `InputError` for anything else."""
    if not os.path.exists(path):  # Path.exists raises for some paths, as one that is too long
        raise InputError(f"{path} does not exist or cannot be reached; give the path of a text file")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of a text file")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read; give a shorter file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); give the path of a text file") from error
    if "\0" in text:
        raise InputError(f"{path} is binary; give the path of a text file")
    return text


def _parse_conversation(content: dict[str, Any]) -> Conversation:
    system = content.get("system")
    if system is not None and not _is_text(system):
        raise InputError(f"its system prompt is {type(system).__name__}, expected text")
    messages = content.get("messages")
    if not isinstance(messages, list) or len(messages) % 2:
        raise InputError("its messages are not a list of questions, each with its answer")
    return Conversation(system, tuple(_parse_message(index, item) for index, item in enumerate(messages)))


def _parse_message(index: int, item: Any) -> Message:
    role: Literal["user", "assistant"] = "assistant" if index % 2 else "user"
    if not isinstance(item, dict) or item.get("role") != role or not _is_text(item.get("content")):
        raise InputError(f"message {index} is not a text of the {role}")
    return Message(role, item["content"], item.get("partial") is True)


def _parse_settings(content: dict[str, Any]) -> SamplingSettings:
    values = content.get("settings", {})
    unknown = sorted(set(values) - set(SamplingSettings.names())) if isinstance(values, dict) else ["not an object"]
    if unknown:
        raise InputError(f"its settings are not known here: {', '.join(unknown)}")
    if isinstance(values.get("stop"), list):
        values = values | {"stop": tuple(values["stop"])}
    return SamplingSettings(**values)


def _is_text(value: object) -> bool:
    # JSON can carry a lone surrogate, which no tokenizer takes.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
