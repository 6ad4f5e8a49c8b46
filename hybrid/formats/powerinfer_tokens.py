"""A model's tokenizer as PowerInfer's metadata has it.

Its llama.cpp knows two kinds: `llama`, SentencePiece's, which merges the pair of the best score, and `gpt2`, byte-level
BPE, which cuts texts as GPT-2 does. The whole tokenizer.json goes along under the key that GGUF has for it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from hybrid.formats.gguf_types import BYTE, CONTROL, UNKNOWN, USER
from hybrid.formats.text import TextCodec

_NORMAL = 1
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PARTS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_metadata(codec: TextCodec, vocab_size: int) -> dict[str, Any]:
    """Entries of `tokenizer.*`; ids that the tokenizer has no token for get names of no meaning."""
    text = codec.tokenizer.to_str()
    model = json.loads(text)["model"]
    known = {number: token for token, number in codec.tokenizer.get_vocab().items()}
    tokens = [known.get(number, f"[unused{number}]") for number in range(vocab_size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    pieces = bool(model.get("byte_fallback"))
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": _scores(tokens, merges),
        "tokenizer.ggml.token_type": _types(codec, tokens, model.get("unk_token") if pieces else None),
        "tokenizer.huggingface.json": text,
    }
    if not pieces:
        found |= {"tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": "gpt-2"}
    for part, name in _PARTS.items():
        number = codec.token_id(codec.special_texts.get(f"{part}_token", ""))
        if number is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = number
    if codec.template_text is not None:
        found["tokenizer.chat_template"] = codec.template_text
    return found


def _scores(tokens: list[str], merges: list[str]) -> np.ndarray:
    """f32, the better the earlier a token is merged; 0 for what is not."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return np.array([-float(ranks.get(token, 0)) for token in tokens], np.float32)


def _types(codec: TextCodec, tokens: list[str], unknown: str | None) -> np.ndarray:
    added = codec.tokenizer.get_added_tokens_decoder()

    def kind(number: int, token: str) -> int:
        if token == unknown:
            return UNKNOWN
        if number in added:
            return CONTROL if added[number].special else USER
        return BYTE if unknown and _BYTE_TOKEN.fullmatch(token) else _NORMAL

    return np.array([kind(number, token) for number, token in enumerate(tokens)], np.int32)
