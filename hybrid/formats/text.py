"""Text and conversations of a model folder to tokens and back."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hybrid.errors import InputError
from hybrid.formats.long_text import PIECE_CHARACTERS, encode_pieces
from hybrid.formats.messages import MAX_CHARACTERS, Message
from hybrid.formats.templates import ChatTemplate
from hybrid.formats.tokenizer import load_tokenizer


class TextCodec:
    """Text to token ids and back, and conversations to prompts, as the model folder's files say."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Raises `ModelError` when `tokenizer.json` is missing or corrupt, or of another model."""
        self._folder, self._vocab_size = folder, vocab_size
        self._tokenizer, self._special = load_tokenizer(folder, vocab_size)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.read(self._folder)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded. Raises `ModelError` for a template that is not valid."""
        return self._template is not None

    @property
    def template_text(self) -> str | None:
        """The chat template as it is written, None where there is none. Raises `ModelError` as the one above."""
        return None if self._template is None else self._template.source

    @property
    def template_knows_tools(self) -> bool:
        """Whether the chat template speaks of `tools`. Raises `ModelError` as the ones above."""
        return self._template is not None and self._template.knows_tools

    @property
    def tokenizer(self) -> Tokenizer:
        """The `tokenizers` object that does the work."""
        return self._tokenizer

    @property
    def special_texts(self) -> Mapping[str, str]:
        """The texts of special tokens by their part, such as `eos_token`."""
        return self._special

    def encode(self, text: str, *, special: bool = True, enough: int | None = None) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer itself puts around a text (often a start token).

        enough: reading ends where so many tokens or more were found, at the end of a piece of `PIECE_CHARACTERS`, with
        at most one piece more read.
        """
        return _until(enough, self.pieces(text, special=special))

    def encode_document(self, text: str, enough: int | None = None) -> list[int]:
        """A whole text as language models are trained on it: start token, text, end token, where there are such."""
        return _until(enough, self.document_pieces(text))

    def encode_prompt(self, prompt: str | Sequence[int], enough: int) -> list[int]:
        """Token ids of a text to go on with, or the ids as they were given.

        Raises `InputError` for anything else and for a text of more than `MAX_CHARACTERS`.
        """
        if isinstance(prompt, str):
            if len(prompt) > MAX_CHARACTERS:
                raise InputError(
                    f"the prompt has {len(prompt):,} characters, at most {MAX_CHARACTERS:,} are taken; cut it"
                )
            return self.encode(prompt, enough=enough)
        try:
            if isinstance(prompt, bytes | bytearray):
                raise TypeError("bytes are no ids")
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            found = f"the prompt is of type {type(prompt).__name__}"
            raise InputError(f"{found}, expected text, or whole numbers that are token ids") from error

    def pieces(self, text: str, *, special: bool = True) -> Iterator[list[int]]:
        """What `encode` gives, piece by piece as they are asked for, in memory that does not grow with the text.

        Raises `InputError` for text that is not Unicode or has a token without an embedding; `encode` does so too.
        """
        try:
            for piece in self._pieces(text, special):
                self._check_embedded(piece)
                yield piece
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
        """The id of a token by its text, None where the tokenizer or the model has none."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None or found >= self._vocab_size else found

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those `texts` that are one special token each, which `decode` leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        ids = (self.token_id(text) for text in texts)
        return frozenset(number for number in ids if number in added and added[number].special)

    def eos_tokens(self) -> list[int]:
        """The end token that the tokenizer's files name, if any."""
        found = self.token_id(self._special.get("eos_token", ""))
        return [] if found is None else [found]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation; `tools` is for templates that know them.

        Raises `InputError` when the model has no template or refuses it.
        """
        if self._template is None:
            raise InputError("this model has no chat template; use `hybrid generate` with plain text instead")
        return self._template.render(messages, self._special, add_generation_prompt, tools)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enough: int | None = None,
    ) -> list[int]:
        """Token ids of the prompt that `render` makes of a conversation; `enough` as in `encode`."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self.encode(text, special=False, enough=enough)

    def _pieces(self, text: str, special: bool) -> Iterator[list[int]]:
        if len(text) <= PIECE_CHARACTERS:
            yield self._tokenizer.encode(text, add_special_tokens=special).ids
            return
        before, after = self._surroundings if special else ([], [])
        yield before
        yield from encode_pieces(self._tokenizer, text)
        yield after

    def _check_embedded(self, tokens: Sequence[int]) -> None:
        largest = max(tokens, default=0)
        if largest >= self._vocab_size:
            raise InputError(
                f"the text has the token {self._tokenizer.id_to_token(largest)!r} with id {largest}, for which the "
                f"model, with {self._vocab_size} embeddings, has none; leave it out"
            )

    @cached_property
    def _surroundings(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        word = self._tokenizer.encode("a", add_special_tokens=False).ids
        around = self._tokenizer.encode("a", add_special_tokens=True).ids
        for at in range(len(around) - len(word) + 1):
            if around[at : at + len(word)] == word:
                return around[:at], around[at + len(word) :]
        return around, []


def _until(enough: int | None, pieces: Iterable[list[int]]) -> list[int]:
    """The tokens of `pieces`; once there are `enough`, no more pieces are asked for."""
    tokens: list[int] = []
    for piece in pieces:
        tokens += piece
        if enough is not None and len(tokens) >= enough:
            break
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
