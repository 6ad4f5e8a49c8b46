"""Tokenizer, chat template and generation defaults of a model folder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from hybrid.errors import InputError, ModelError
from hybrid.formats.config import read_json
from hybrid.formats.long_text import PIECE_CHARACTERS, encode_pieces
from hybrid.generation import SamplingSettings

Message = Mapping[str, str]


class TextCodec:
    """Text to token ids and back, and conversations to prompts, as the model folder's files say."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Raises `ModelError` when `tokenizer.json` is missing, corrupt, or has ids beyond `vocab_size`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing; convert the tokenizer with transformers' save_pretrained")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} is not a tokenizer ({error}); fetch it again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        if largest >= vocab_size:
            raise ModelError(
                f"{path} has token id {largest}, the model has {vocab_size} embeddings; files do not match"
            )
        self._special = _special_tokens(folder)
        self._template = _chat_template(folder)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, special: bool = True, most: int | None = None) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer itself puts around a text (often a start token).

        most: no more tokens than these are given, the first, and little more text is read than they take.
        """
        return _first(self.pieces(text, special=special), most)

    def encode_document(self, text: str, most: int | None = None) -> list[int]:
        """A whole text as language models are trained on it: start token, text, end token, where there are such."""
        return _first(self.document_pieces(text), most)

    def pieces(self, text: str, *, special: bool = True) -> Iterator[list[int]]:
        """What `encode` gives, piece by piece as they are asked for, in memory that does not grow with the text."""
        try:
            if len(text) <= PIECE_CHARACTERS:
                yield self._tokenizer.encode(text, add_special_tokens=special).ids
                return
            before, after = self._surroundings if special else ([], [])
            yield before
            yield from encode_pieces(self._tokenizer, text)
            yield after
        except (TypeError, UnicodeError) as error:
            raise InputError("the text is not valid Unicode; expected UTF-8") from error

    def document_pieces(self, text: str) -> Iterator[list[int]]:
        """What `encode_document` gives, piece by piece as they are asked for."""
        start, last = self.token_id(self._special.get("bos_token", "")), None
        waiting = [] if start is None else [start]  # until it is known whether the tokenizer gives it too
        for piece in filter(None, self.pieces(text)):
            yield [] if waiting[:1] == piece[:1] else waiting
            yield piece
            waiting, last = [], piece[-1]
        yield waiting
        yield [end for end in self.eos_tokens() if end != last]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def eos_tokens(self) -> list[int]:
        """The end token that the tokenizer's files name, if any."""
        token = self._special.get("eos_token")
        found = self.token_id(token) if token else None
        return [] if found is None else [found]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Raises `InputError` when the model has no template or refuses it."""
        if self._template is None:
            raise InputError("this model has no chat template; use `hybrid generate` with plain text instead")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._special
            )
        except Exception as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from error

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, most: int | None = None
    ) -> list[int]:
        """Token ids of the prompt that `render` makes, at most `most` of them."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt), special=False, most=most)

    @cached_property
    def _surroundings(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        word = self._tokenizer.encode("a", add_special_tokens=False).ids
        around = self._tokenizer.encode("a", add_special_tokens=True).ids
        for at in range(len(around) - len(word) + 1):
            if around[at : at + len(word)] == word:
                return around[:at], around[at + len(word) :]
        return around, []


def _first(pieces: Iterable[list[int]], most: int | None) -> list[int]:
    """The tokens of `pieces`, at most `most`; pieces beyond are not asked for."""
    tokens: list[int] = []
    for piece in pieces:
        tokens += piece
        if most is not None and len(tokens) >= most:
            return tokens[:most]
    return tokens


class StreamDecoder:
    """Token by token to text: holds back bytes that do not yet make a whole character.

    Decodes from a few tokens back, since in many vocabularies a token's text depends on the one before.
    """

    def __init__(self, codec: TextCodec, before: Sequence[int] = ()) -> None:
        """`before`: tokens that come first and are not shown; some decoders drop the space of a text's first word."""
        self._codec = codec
        self._tokens = list(before)
        self._start, self._read = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What was held back, with unfinished characters shown as the replacement character."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._codec.decode(self._tokens[self._start : self._read])
        after = self._codec.decode(self._tokens[self._start :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]


def generation_defaults(folder: Path) -> tuple[SamplingSettings, list[int]]:
    """Sampling settings from `generation_config.json`, or greedy; end tokens from there or from `config.json`.

    Raises `ModelError` for values of the wrong type or out of range.
    """
    path = folder / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    ends = values.get("eos_token_id", read_json(folder / "config.json").get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise ModelError(f"{path}: eos_token_id is {ends}, expected token ids; correct the file")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    given = {name: values[name] for name in names if values.get(name) is not None}
    off: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sampled = values.get("do_sample", False)
    try:
        return SamplingSettings(**(off | given | ({} if sampled else {"temperature": 0.0}))), ends
    except InputError as error:
        raise ModelError(f"{path}: {error}; correct the file or delete it") from error


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like by name; the tokenizer's own file wins over special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        for key, value in (read_json(path) if path.is_file() else {}).items():
            if key.endswith("_token") and value:
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    found[key] = text
    return found


def _chat_template(folder: Path) -> jinja2.Template | None:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    source: Any = _read_template(path) if path.is_file() else None
    if source is None and config.is_file():
        source = read_json(config).get("chat_template")
    if isinstance(source, list):  # several named templates; the one for plain chat is `default`
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelError(f"the chat template in {folder} is a {type(source).__name__}, expected text")
    # The template is code from the model folder: it runs without access to attributes or modules.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template in {folder} is not valid ({error})") from error


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not readable text ({error}); fetch it again") from error


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
