"""The chat template of a model folder: messages to the text of a prompt.

A template is code that came with the model. It runs as in transformers, but in `Sandbox`, within bounds, and is read
and compiled when it is first needed: what needs no template works beside one that is broken.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import jinja2

from hybrid.errors import InputError, ModelError
from hybrid.formats.config import read_json
from hybrid.formats.messages import Message, check_messages, check_roles
from hybrid.formats.sandbox import Sandbox, bounded

MAX_SOURCE = 2**17  # characters of a template: compiling as many takes 1 to 3 s
# What a rendering may make, in bytes: a template may go through the conversation many times, but not without end.
_BYTES, _BYTES_PER_MESSAGE, _BYTES_PER_CHARACTER, _MOST = 2**24, 2**14, 256, 2**30


class ChatTemplate:
    """A compiled template, and its `source`."""

    def __init__(self, source: str, where: Path) -> None:
        """Raises `ModelError`, naming the file `where` it comes from, for a template that is not valid or too long."""
        if len(source) > MAX_SOURCE:
            raise ModelError(
                f"the chat template in {where} has {len(source):,} characters, at most {MAX_SOURCE:,} are read"
            )
        self.source = source
        self._code = _compile(source, where)

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, None where it has none. Raises `ModelError` for one that cannot be used."""
        path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if path.is_file():
            return cls(_read_source(path), path)
        source: Any = read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(source, list):  # several named templates; the one for plain chat is `default`
            source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        if isinstance(source, dict):
            source = source.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelError(f"the chat template in {config} is of type {type(source).__name__}, expected text")
        return cls(source, config)

    @property
    def knows_tools(self) -> bool:
        """Whether the template does anything with `tools`."""
        return re.search(r"\btools\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        special: Mapping[str, str],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation; `special` are the special tokens by their part. tools: functions that may
        be called, in the form of OpenAI's chats, as transformers gives them to templates.

        Raises `InputError` for messages that are none or that the template refuses, and where it fails or has no end.
        """
        checked = check_messages(messages)
        check_roles(checked, self.source)
        characters = sum(len(value) for message in checked for value in message.values() if isinstance(value, str))
        characters += len(json.dumps(tools)) if tools else 0
        limit = min(_MOST, _BYTES + _BYTES_PER_MESSAGE * len(checked) + _BYTES_PER_CHARACTER * characters)
        environment = Sandbox(limit)
        environment.globals |= {"raise_exception": _raise_template_error, "strftime_now": _now}
        template = jinja2.Template.from_code(environment, self._code, environment.make_globals(None))
        variables = {"messages": checked, "tools": list(tools) if tools else None, "documents": None}
        try:
            return template.render(variables | {"add_generation_prompt": add_generation_prompt} | dict(special))
        except Exception as error:
            raise InputError(f"the model's chat template refuses these messages: {_reason(error)}") from error


def _read_source(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_SOURCE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not readable text ({error}); fetch it again") from error


def _compile(source: str, where: Path) -> CodeType:
    environment = Sandbox()
    try:
        return environment.compile(bounded(environment.parse(source)))
    except Exception as error:
        raise ModelError(f"the chat template in {where} is not valid ({_reason(error)}); fetch it again") from error


def _reason(error: Exception) -> str:
    """What went wrong, in one line of a bounded length."""
    if isinstance(error, RecursionError):
        return "it is nested or calls itself too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return " ".join((str(error) or type(error).__name__)[:300].split())


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
