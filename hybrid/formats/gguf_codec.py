"""What a GGUF file says of texts and answers: tokenizer, chat template, end tokens; and the files that a folder has."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np

from hybrid.errors import ModelError
from hybrid.formats.generation_config import GenerationDefaults
from hybrid.formats.gguf_file import GGUFFile
from hybrid.formats.gguf_tokenizer import read_tokenizer
from hybrid.formats.gguf_types import CONTROL
from hybrid.formats.templates import ChatTemplate
from hybrid.formats.text import TextCodec
from hybrid.generation import SamplingSettings

_TEMPLATE = "tokenizer.chat_template"
_ENDS = ("eos", "eot", "eom")
# Tokens that end a turn where a file names only the one that ends a text.
_END_TEXTS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<EOT>")
)


class GGUFCodec(TextCodec):
    """Text to token ids and back, and conversations to prompts, as a GGUF file says."""

    def __init__(self, file: GGUFFile, vocab_size: int) -> None:
        """Raises `ModelError` when the tokenizer is of an unknown kind, damaged, or of another model."""
        self._file, self._vocab_size = file, vocab_size
        self._tokenizer, self._special = read_tokenizer(file, vocab_size)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        source = self._file.metadata.get(_TEMPLATE)
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelError(f"{self._file.path}: '{_TEMPLATE}' is of type {type(source).__name__}, expected text")
        return ChatTemplate(source, self._file.path)

    def files(self) -> dict[str, str]:
        """Names and texts of the files of a model folder that say what this codec does."""
        config: dict[str, object] = dict(self._special)
        template = self._file.metadata.get(_TEMPLATE)
        if isinstance(template, str):
            config["chat_template"] = template
        ends = list(gguf_defaults(self._file).end_tokens)
        return {
            "tokenizer.json": self._tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=1),
            "generation_config.json": json.dumps({"eos_token_id": ends, "do_sample": False}),
        }


def gguf_defaults(file: GGUFFile) -> GenerationDefaults:
    """Greedy answers, which end with the tokens that the file names, or that end a turn in all models that have them.

    Raises `ModelError` for end tokens that are no ids.
    """
    ends: list[int] = []
    for part in _ENDS:
        value = file.metadata.get(f"tokenizer.ggml.{part}_token_id", 2**32 - 1)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{file.path}: 'tokenizer.ggml.{part}_token_id' is {str(value)[:60]}, expected a token id")
        ends += [value] if value != 2**32 - 1 else []
    tokens, types = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(types, np.ndarray):
        ends += [int(i) for i in np.flatnonzero(types == CONTROL) if i < len(tokens) and tokens[i] in _END_TEXTS]
    settings, _ = SamplingSettings.from_file({})
    return GenerationDefaults(settings, tuple(dict.fromkeys(ends)))
