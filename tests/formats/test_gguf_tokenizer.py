"""Tokenizers from GGUF files: SentencePiece's algorithm, byte-level BPE by its name, special tokens, end tokens."""

import itertools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from hybrid.errors import ModelError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.gguf_codec import GGUFCodec, gguf_defaults
from hybrid.formats.gguf_file import GGUFFile
from hybrid.formats.gguf_tokenizer import PRES, read_tokenizer
from hybrid.formats.text import TextCodec

TEXTS = [
    "Hello world, it's 12 o'clock; I'LL go. 1234567 3.14",
    "  two  blanks\n\n\nlines \t tabs\r\n end   ",
    "Gr\u00fc\u00dfe aus K\u00f6ln, \u4f60\u597d\u4e16 \U0001f642 na\u00efve e\u0301 \u0939\u093f\u0928\u094d",
    "def f(x):\n    return x**2  # 100% $5 <tag> |a|`b`",
    "HTTPServer camelCase UPPER lower_case don't WE'VE",
    "",
    " ",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
CHARS = "abcde \u00fc"


def file_of(path=Path("m.gguf"), **keys):
    return GGUFFile(path, {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}, {})


def byte_level(pre, **more):
    """A vocabulary of the shipped tokenizer under another name of cutting."""
    stored = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    model = json.loads(stored.to_str())["model"]
    tokens = [token for token, _ in sorted(stored.get_vocab().items(), key=lambda item: item[1])]
    special = {number for number, token in stored.get_added_tokens_decoder().items() if token.special}
    types = np.array([CONTROL if number in special else NORMAL for number in range(len(tokens))], np.int32)
    merges = [" ".join(pair) for pair in model["merges"]]
    keys = {"ggml__model": "gpt2", "ggml__pre": pre, "ggml__tokens": tokens, "ggml__token_type": types}
    return file_of(**(keys | {"ggml__merges": merges, "ggml__bos_token_id": 0, "ggml__eos_token_id": 1} | more))


def pieces(seed=0, count=40):
    """A vocabulary as SentencePiece makes it, with scores of which no two are the same."""
    rng = random.Random(seed)
    alphabet = CHARS.replace(" ", "\u2581")
    words = {"".join(rng.choices(alphabet, k=rng.randint(2, 5))) for _ in range(count)}
    words |= {word[:n] for word in words for n in range(2, len(word))}  # so that every piece can be reached
    scores = rng.sample(range(1, 10_000), len(words))
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    entries += [(char, -20_000.0 - n, NORMAL) for n, char in enumerate(alphabet)]
    entries += [(word, -float(score), NORMAL) for word, score in zip(sorted(words), scores, strict=True)]
    return [*entries, ("[INST]", 0.0, USER)]


def sentence_piece(entries, **more):
    tokens, scores, types = (list(column) for column in zip(*entries, strict=True))
    keys = {"ggml__model": "llama", "ggml__tokens": tokens, "ggml__scores": np.array(scores, np.float32)}
    keys |= {"ggml__token_type": np.array(types, np.int32), "ggml__bos_token_id": 1, "ggml__eos_token_id": 2}
    return file_of(**(keys | more))


def merged(text, entries):
    """SentencePiece: of all neighbours that make a piece together, the best piece first, the leftmost of equals."""
    ids = {token: number for number, (token, *_) in enumerate(entries)}
    symbols = list(text)
    while True:
        both = [a + b for a, b in itertools.pairwise(symbols)]
        pairs = [(-entries[ids[piece]][1], at) for at, piece in enumerate(both) if piece in ids]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return list(itertools.chain.from_iterable(found))


@pytest.mark.parametrize("prefixed", [True, False])
def test_pieces_are_merged_as_sentence_piece_does(prefixed):
    entries, rng = pieces(), random.Random(1)
    codec = GGUFCodec(sentence_piece(entries, ggml__add_space_prefix=prefixed), len(entries))
    for _ in range(200):
        text = "".join(rng.choices(CHARS + "\u00df", k=rng.randint(1, 30)))
        expected = merged(("\u2581" if prefixed else "") + text.replace(" ", "\u2581"), entries)
        assert codec.encode(text, special=False) == expected, text
        assert codec.encode(text) == [1, *expected]
        assert codec.decode([1, *expected]) == text


def test_what_has_no_piece_is_bytes_and_added_tokens_are_one():
    entries = pieces()
    codec = GGUFCodec(sentence_piece(entries, ggml__add_bos_token=False, ggml__add_eos_token=True), len(entries))
    assert codec.encode("\u4f60", special=False)[1:] == [3 + byte for byte in "\u4f60".encode()]
    assert codec.encode("[INST]</s>") == [len(entries) - 1, 2, 2]
    assert codec.decode(codec.encode("\u4f60 a\u00fc</s>")) == "\u4f60 a\u00fc"
    assert codec.decode([len(entries) - 1]) == "[INST]" and codec.eos_tokens() == [2]


def test_the_shipped_tokenizer_is_rebuilt_from_its_parts():
    codec, own = GGUFCodec(byte_level("gpt-2"), 8192), TextCodec(EMBEDDED_MODEL, 8192)
    document = (EMBEDDED_MODEL.parent / "corpus" / "heldout.jsonl").read_text(encoding="utf-8")[:20_000]
    for text in [*TEXTS, document, "<|bos|><|user|>Hi there<|assistant|>"]:
        assert codec.encode(text) == own.encode(text) and codec.decode(own.encode(text)) == own.decode(own.encode(text))


def test_whole_tokenizer_json_goes_before_all_else():
    text = (EMBEDDED_MODEL / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer, special = read_tokenizer(byte_level("default", huggingface__json=text), 8192)
    assert tokenizer.to_str() == Tokenizer.from_str(text).to_str() and special["eos_token"] == "<|eos|>"


CUTS = {
    "gpt-2": ["HTTPServer", " 12345", " it", "'s", " x", "   ", " y", "\n", "\n", "z", "!?"],
    "smollm": ["HTTPServer", " ", "1", "2", "3", "4", "5", " it", "'s", " x", "   ", " y", "\n", "\n", "z", "!?"],
    "llama-bpe": ["HTTPServer", " ", "123", "45", " it", "'s", " x", "   ", " y", "\n\n", "z", "!?"],
    "qwen2": ["HTTPServer", " ", "1", "2", "3", "4", "5", " it", "'s", " x", "   ", " y", "\n\n", "z", "!?"],
    "tekken": ["HTTPServer", " ", "1", "2", "3", "4", "5", " it", "'s", " x", "   ", " y", "\n\n", "z", "!?"],
    "gpt-4o": ["HTTPServer", " ", "123", "45", " it's", " x", "   ", " y", "\n\n", "z", "!?"],
    "falcon": ["HTTPServer", " ", "123", "45", " it", "'", "s", " x", "   ", " y", "\n", "\n", "z", "!?"],
    "default": ["HTTPServer", " ", "123", "45", " it", "'", "s", " x", "   ", " y", "\n", "\n", "z", "!?"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_texts_are_cut_as_the_name_says(pre):
    text = "HTTPServer 12345 it's x    y\n\nz!?"
    tokenizer, _ = read_tokenizer(byte_level(pre), 8192)
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert "".join(text[a:b] for _, (a, b) in cut) == text
    assert [text[a:b] for _, (a, b) in cut] == CUTS[pre]


def test_every_name_cuts_and_gives_the_text_back():
    for pre in PRES:
        codec = GGUFCodec(byte_level(pre), 8192)
        for text in TEXTS:
            ids = codec.encode(text)
            composed = unicodedata.normalize("NFC", text) if PRES[pre].composed else text
            assert codec.decode(ids) == composed
            assert (ids[:1] == [0]) == PRES[pre].starts


def test_end_tokens_are_those_of_the_file_and_of_turns():
    file = byte_level("gpt-2", ggml__eot_token_id=2)
    assert gguf_defaults(file).end_tokens == (1, 2)
    file.metadata["tokenizer.ggml.tokens"][4] = "<|im_end|>"
    assert gguf_defaults(file).end_tokens == (1, 2, 4)
    assert gguf_defaults(file).settings.temperature == 0


def test_the_template_is_rendered_and_goes_to_a_folder(tmp_path):
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    codec = GGUFCodec(byte_level("gpt-2", chat_template=source), 8192)
    messages = [{"role": "user", "content": "Hi"}]
    assert codec.render(messages) == "<|bos|>[user] Hi"
    for name, text in codec.files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    copy = TextCodec(tmp_path, 8192)
    assert copy.render(messages) == codec.render(messages) and copy.eos_tokens() == codec.eos_tokens() == [1]
    for text in TEXTS:
        assert copy.encode(text) == codec.encode(text)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"ggml__model": "bert"}, "unknown tokenizer 'bert'; known are llama, gpt2"),
        ({"ggml__pre": "klingon"}, "in the manner 'klingon', which is not known; known are default, gpt-2"),
        ({"ggml__tokens": []}, "has no tokens"),
        ({"ggml__tokens": ["a"] * 8193}, "not as many types of them"),
        ({"ggml__merges": ["a"]}, "the tokenizer in m.gguf is damaged"),
        ({"ggml__merges": ["\u0120 nowhere"]}, "the tokenizer in m.gguf is damaged"),
        ({"ggml__merges": 7}, "the tokenizer in m.gguf is damaged"),
        ({"ggml__eos_token_id": 9000}, "the eos token has id 9000, there are 8192"),
        ({"ggml__add_bos_token": 1}, "'tokenizer.ggml.add_bos_token' is 1, expected true or false"),
        ({"huggingface__json": "{"}, "the tokenizer in m.gguf is damaged"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(more, problem):
    with pytest.raises(ModelError, match=problem) as error:
        read_tokenizer(byte_level("gpt-2", **more), 8192)
    assert "\n" not in str(error.value)


def test_scores_must_be_as_many_as_pieces():
    entries = pieces()
    with pytest.raises(ModelError, match="not as many scores"):
        read_tokenizer(sentence_piece(entries, ggml__scores=np.zeros(3, np.float32)), len(entries))
    with pytest.raises(ModelError, match=f"has {len(entries)} tokens, the model has 100 embeddings"):
        read_tokenizer(sentence_piece(entries), 100)
