"""The tokenizer of a model folder, with the tokens that its other files add, by transformers' rules.

`tokenizer.json` may not know all special tokens. Others are named in tokenizer_config.json, as `added_tokens_decoder`
and by their part (`eos_token`); older folders have special_tokens_map.json and added_tokens.json in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hybrid.errors import ModelError
from hybrid.formats.config import read_json

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# In this order they get ids where the tokenizer has none for them.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and the text of its special tokens by their part, such as `eos_token`.

    Raises `ModelError` when a file is missing or corrupt, or when the tokenizer is of a model with more embeddings than
    `vocab_size`. Tokens that were added to it may be beyond: only those that a text uses matter.
    """
    path = folder / "tokenizer.json"
    tokenizer = _read_tokenizer(path)
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocab_size:
        raise ModelError(f"{path} has token id {largest}, the model has {vocab_size} embeddings; files do not match")
    config = _read_optional(folder / "tokenizer_config.json")
    declared: dict[int, AddedToken] = {}
    if config.get("added_tokens_decoder") is None:
        config |= _read_optional(folder / "special_tokens_map.json")
        declared = _numbered(folder / "added_tokens.json", special=_special_texts(config))
    else:
        declared = _described(folder / "tokenizer_config.json", config["added_tokens_decoder"])
    _add_declared(folder, tokenizer, declared)
    named = _named(config)
    _add_special(tokenizer, [*named.values(), *_extra(config)])
    return tokenizer, {name: token.content for name, token in named.items()}


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path} is missing; convert the tokenizer with transformers' save_pretrained")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"{path} is not a tokenizer ({error}); fetch it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token(value: object, special: bool = True) -> AddedToken | None:
    """The token that a file names by its text, or describes with its flags."""
    flags = (
        {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)} if isinstance(value, dict) else {}
    )
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        return None
    return AddedToken(text, **({"special": special, "normalized": not special} | flags))


def _named(config: dict[str, Any]) -> dict[str, AddedToken]:
    """Special tokens by their part, the usual ones first."""
    extra = config.get("extra_special_tokens")
    entries = config | (extra if isinstance(extra, dict) else {})
    names = [*_NAMES, *(name for name in entries if name.endswith("_token") and name not in _NAMES)]
    tokens = {name: _token(entries.get(name)) for name in [*names, *(extra if isinstance(extra, dict) else ())]}
    return {name: token for name, token in tokens.items() if token is not None}


def _extra(config: dict[str, Any]) -> list[AddedToken]:
    """Special tokens that have no part of their own."""
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    tokens = [_token(value) for value in listed] if isinstance(listed, list) else []
    return [token for token in tokens if token is not None]


def _special_texts(config: dict[str, Any]) -> set[str]:
    return {token.content for token in [*_named(config).values(), *_extra(config)]}


def _numbered(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, which gives each its id."""
    found: dict[int, AddedToken] = {}
    for text, number in _read_optional(path).items():
        token = _token(text, special=text in special)
        if token is None or not isinstance(number, int):
            raise ModelError(f"{path} gives {text!r} the id {str(number)[:60]}, expected a number; correct the file")
        found[number] = token
    return found


def _described(path: Path, tokens: object) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder`, which describes each under its id."""
    found: dict[int, AddedToken] = {}
    for number, value in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
        token = _token(value, special=False)
        if token is None or not number.isdecimal():
            raise ModelError(
                f"{path}: 'added_tokens_decoder' has {number!r}: {str(value)[:60]}, expected tokens by their ids; "
                "correct the file"
            )
        found[int(number)] = token
    return found


def _add_declared(folder: Path, tokenizer: Tokenizer, declared: dict[int, AddedToken]) -> None:
    """Add the tokens that a file gives an id; where tokenizer.json has other ids or tokens there, it is right."""
    for number, token in sorted(declared.items(), key=lambda item: item[0]):
        known = tokenizer.token_to_id(token.content)
        if known is None and tokenizer.id_to_token(number) is not None:
            continue
        tokenizer.add_tokens([token])
        given = tokenizer.token_to_id(token.content)
        if known is None and given != number:
            raise ModelError(
                f"{folder}: token {token.content!r} has id {number}, which after those of tokenizer.json would be "
                f"{given}; files do not match"
            )


def _add_special(tokenizer: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Make the tokens special, that is found in a text as one and left out of what is shown."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        token = known.get(token.content, token)  # with its flags
        token.special = True
        tokenizer.add_special_tokens([token])
