"""The tokenizer that a GGUF file describes, as a `tokenizers` object.

`llama` is SentencePiece's: pieces with scores, which become merges of the best piece first, and bytes for what has no
piece. `gpt2` is byte-level BPE, whose texts are cut beforehand as the file's `pre` names. A file that brings the whole
tokenizer.json is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hybrid.errors import ModelError
from hybrid.formats.gguf_file import GGUFFile
from hybrid.formats.gguf_types import BYTE, CONTROL, UNKNOWN, USER
from profiler.common.errors import shown

_SPACE = "\u2581"  # SentencePiece's
_JSON = "huggingface.json"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(after: str, digits: str) -> str:
    """Words cut where capitals begin, as in `tekken` and `gpt-4o`."""
    word = r"[^\r\n\p{L}\p{N}]?"
    words = f"{word}{_UPPER}*{_LOWER}+{after}|{word}{_UPPER}+{_LOWER}*{after}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_DIGITS = r"\p{N}"


@dataclass(frozen=True)
class Pre:
    """What a `pre` name means: expressions that cut a text one after another, whether it is composed (NFC) before,
    whether a word that is a token is taken whole, and whether a text begins with the start token."""

    cuts: tuple[str, ...]
    composed: bool = False
    whole: bool = False
    starts: bool = False


_DEFAULT = Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2_LIKE, _DIGITS_APART, _LLAMA3_LIKE = Pre((_GPT2,)), Pre((_DIGITS, _GPT2)), Pre((_LLAMA3,))
_LLAMA3_WHOLE = Pre((_LLAMA3,), whole=True, starts=True)
PRES: dict[str, Pre] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "mpt", "olmo", "jais", "trillion"), _GPT2_LIKE),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_APART),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _LLAMA3_WHOLE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3_LIKE),
    "qwen2": Pre((_QWEN2,), composed=True),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), Pre((_QWEN2,))),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": Pre((_cased("", _DIGITS),), whole=True, starts=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Pre((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))),
    "jais-2": Pre((_LLAMA3.replace(r"|\s+(?!\S)|\s+", f"|{_JAIS2_SPACES}"),)),
}  # fmt: skip


@dataclass(frozen=True)
class _Vocabulary:
    """`tokenizer.ggml.*`, checked."""

    file: GGUFFile
    tokens: list[str]
    types: np.ndarray

    @classmethod
    def of(cls, file: GGUFFile) -> _Vocabulary:
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ModelError(f"{file.path} has no tokens; convert the model with its tokenizer")
        types = file.metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32))
        if not isinstance(types, np.ndarray) or len(types) != len(tokens):
            raise ModelError(f"{file.path} has {len(tokens)} tokens, but not as many types of them; fetch it again")
        return cls(file, tokens, types)

    def get(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}", default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.file.path}: 'tokenizer.ggml.{name}' is {shown(value)}, expected true or false")
        return value

    def token(self, part: str) -> str | None:
        """The text of the token that has a part, such as `eos`."""
        number = self.get(f"{part}_token_id")
        if number is None or number == 2**32 - 1:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise ModelError(f"{self.file.path}: the {part} token has id {shown(number)}, there are {len(self.tokens)}")
        return self.tokens[number]

    def ids(self) -> dict[str, int]:
        """Ids by texts, of two of the same text the first."""
        found: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            found.setdefault(token, number)
        return found

    def numbers(self, name: str) -> np.ndarray:
        """One number for each token. Raises `ModelError` where there are not as many."""
        found = self.get(name)
        if not isinstance(found, np.ndarray) or len(found) != len(self.tokens) or not np.isfinite(found).all():
            raise ModelError(f"{self.file.path} has {len(self.tokens)} tokens, but not as many {name}; fetch it again")
        return found


def read_tokenizer(file: GGUFFile, vocab_size: int) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and the text of its special tokens by their part, such as `eos_token`.

    Raises `ModelError` for a kind of tokenizer that is not known, one that is damaged, or one of another model.
    """
    words = _Vocabulary.of(file)
    if len(words.tokens) > vocab_size:
        raise ModelError(f"{file.path} has {len(words.tokens)} tokens, the model has {vocab_size} embeddings")
    text = file.metadata.get(f"tokenizer.{_JSON}")
    try:
        tokenizer = Tokenizer.from_str(text) if isinstance(text, str) else _built(words)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the tokenizer in {file.path} is damaged ({error}); fetch it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    parts = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "separator", "pad": "padding"}
    special = {f"{name}_token": words.token(part) for name, part in parts.items()}
    return tokenizer, {name: token for name, token in special.items() if token is not None}


def _built(words: _Vocabulary) -> Tokenizer:
    kinds = {"llama": _sentence_piece, "gpt2": _byte_level}
    kind = words.get("model")
    if not isinstance(kind, str) or kind not in kinds:
        raise ModelError(f"{words.file.path}: unknown tokenizer {shown(kind)}; known are {', '.join(kinds)}")
    tokenizer, starts = kinds[kind](words)
    _add_tokens(tokenizer, words)
    _surround(tokenizer, words, starts)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, words: _Vocabulary) -> None:
    """Make tokens special, that is found in a text as one, and left out of what is shown where they control."""
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER,), False)):
        texts = [words.tokens[number] for number in np.flatnonzero(np.isin(words.types, kinds))]
        added = [AddedToken(text, special=special, normalized=False) for text in texts if text]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _surround(tokenizer: Tokenizer, words: _Vocabulary, starts: bool) -> None:
    """Have the start and end tokens put around a text where the file says so."""
    before = words.token("bos") if words.flag("add_bos_token", starts) else None
    after = words.token("eos") if words.flag("add_eos_token", False) else None
    around = [token for token in (before, after) if token is not None]
    if around:
        single = [*([before] if before else []), "$A", *([after] if after else [])]
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _byte_level(words: _Vocabulary) -> tuple[Tokenizer, bool]:
    name, merges = words.get("pre", "default"), words.get("merges", [])
    if not isinstance(name, str) or name not in PRES:
        raise ModelError(
            f"{words.file.path}: it cuts texts in the manner {shown(name)}, which is not known; "
            f"known are {', '.join(PRES)}"
        )
    pre = PRES[name]
    # Two texts with a blank between them, of which the first may begin with one.
    cuts = [merge.find(" ", 1) for merge in merges]
    pairs = [(merge[:at], merge[at + 1 :]) for merge, at in zip(merges, cuts, strict=True)]
    tokenizer = Tokenizer(models.BPE(words.ids(), pairs, ignore_merges=pre.whole))
    if pre.composed:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    bytes_as_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_as_text])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.starts


def _sentence_piece(words: _Vocabulary) -> tuple[Tokenizer, bool]:
    ids, scores = words.ids(), words.numbers("scores")
    has_bytes = bool((words.types == BYTE).any())
    merges = _merges(words, ids, scores)
    unknown = words.token("unknown") or next(
        iter(words.tokens[i] for i in np.flatnonzero(words.types == UNKNOWN)), None
    )
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    tokenizer, prefixed = Tokenizer(model), words.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer, True


def _merges(words: _Vocabulary, ids: dict[str, int], scores: np.ndarray) -> Sequence[tuple[str, str]]:
    """Every way to make a piece of two others, that of the best score first."""
    found: list[tuple[float, int, int, str, str]] = []
    plain = ~np.isin(words.types, (UNKNOWN, CONTROL, BYTE))
    for number in np.flatnonzero(plain):
        piece, score = words.tokens[number], -float(scores[number])
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in ids and right in ids:
                found.append((score, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
