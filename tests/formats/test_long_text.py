"""Long texts, piece by piece: the same tokens as in one call, from calls of a bounded length."""

import itertools
import random

import pytest
from model_cases import save_byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.long_text import PIECE_CHARACTERS, encode_pieces
from hybrid.formats.text import TextCodec


def words(count, *choices):
    chosen = random.Random(0)
    return "".join(chosen.choice(choices) for _ in range(count))


def joined(pieces):
    return list(itertools.chain.from_iterable(pieces))


TEXTS = {
    "words": words(3000, "the ", "cat", " sat,\n", "\n\n", "  12345 ", "naïve"),
    "characters of several bytes": words(4000, "日", "本", "🐶", " "),
    "special tokens": words(2000, "<|user|>", "<|", "user|>", "Hi"),
    "one word": words(5000, *"abcdef"),
    "one letter": "a" * 5000,
    "spaces": " " * 5000,
    "digits": "7" * 5000,
    "just over a piece": "ab " * 334,
}


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def prefixed():
    """As of Llama 2: the whole text is one word, with a mark before it."""
    characters = sorted({*"".join(TEXTS.values()), "\u2581"})
    vocab = {token: number for number, token in enumerate(["<unk>", *characters, "th", "the", "\u2581c", "aa", "aaaa"])}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "c"), ("a", "a"), ("aa", "aa")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "prefixed"])
def test_pieces_give_the_tokens_of_one_call(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    pieces = list(encode_pieces(tokenizer, TEXTS[text], size=1000, overlap=200))
    assert len(pieces) > 1
    assert joined(pieces) == tokenizer.encode(TEXTS[text], add_special_tokens=False).ids


def test_text_on_which_pieces_do_not_agree_is_cut_and_nothing_is_lost():
    vocab = {"7" * count: count for count in (1, 2, 3)} | {"<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    pieces = list(encode_pieces(tokenizer, "7" * 2000, size=1000, overlap=201))
    assert pieces == [[3] * 333 + [1]] * 2  # the count of a token is its id


class CountingTokenizer:
    """Notes how long each text is that it is asked to encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def encode(self, text, add_special_tokens):
        self.calls.append(len(text))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def token_to_id(self, token):
        return self.tokenizer.token_to_id(token)


@pytest.fixture
def counted(tmp_path):
    """A codec whose tokenizer puts token 1 before a text and 2 after it, and notes what it is called with."""
    save_byte_tokenizer(tmp_path)
    codec = TextCodec(tmp_path, 128)
    tokenizer = codec._tokenizer
    around = [(tokenizer.id_to_token(number), number) for number in (1, 2)]
    template = f"{around[0][0]} $A {around[1][0]}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    codec._tokenizer = CountingTokenizer(tokenizer)
    return codec


def test_a_long_text_is_encoded_by_calls_of_a_bounded_length(counted):
    text = "ab" * PIECE_CHARACTERS
    tokens = counted.encode(text)
    assert len(tokens) == len(text) + 2 and (tokens[0], tokens[-1]) == (1, 2)
    assert tokens[1:-1] == counted.encode("ab", special=False) * PIECE_CHARACTERS
    assert max(counted._tokenizer.calls) <= PIECE_CHARACTERS
    short = counted.encode("ab")
    assert (short[0], short[-1], len(short)) == (1, 2, 4)


def test_no_more_is_encoded_than_is_wanted(counted):
    text, pair = "ab" * 500_000, counted.encode("ab", special=False)
    counted._tokenizer.calls.clear()
    tokens = counted.encode(text, enough=5)
    assert 5 <= len(tokens) <= PIECE_CHARACTERS and tokens[:5] == [1, *pair, *pair]
    assert counted.encode_document(text, enough=5) == counted.encode_prompt(text, enough=5) == tokens
    assert sum(counted._tokenizer.calls) <= 3 * 2 * PIECE_CHARACTERS + 10
    assert counted.encode("ab", enough=100) == counted.encode("ab")


def test_a_long_document_has_its_start_and_end_once():
    codec, text = TextCodec(EMBEDDED_MODEL, 8192), "Once. " * (PIECE_CHARACTERS // 4)
    tokens = codec.encode_document(text)
    assert (tokens[0], tokens[-1], tokens.count(0), tokens.count(1)) == (0, 1, 1, 1)
    assert codec.decode(tokens) == text
    pieces = list(codec.document_pieces(text))
    assert joined(pieces) == tokens and max(map(len, pieces)) <= PIECE_CHARACTERS
    assert codec.encode_document("") == [0, 1]


def test_text_that_is_no_unicode_is_refused_wherever_it_stands():
    codec = TextCodec(EMBEDDED_MODEL, 8192)
    for text in ("\ud800", "a" * 2 * PIECE_CHARACTERS + "\ud800"):
        with pytest.raises(InputError, match="not valid Unicode"):
            codec.encode(text)


def test_decoding_gives_a_long_text_back(byte_level):
    byte_level.decoder = decoders.ByteLevel()
    text = "".join(TEXTS.values())
    assert byte_level.decode(joined(encode_pieces(byte_level, text, 1000, 200)), skip_special_tokens=False) == text
