"""Tokenizer, chat template and streaming decode."""

import json

import numpy as np
import pytest
import torch
from model_cases import save_byte_tokenizer
from tokenizers import Tokenizer, decoders, models

from hybrid.errors import InputError, ModelError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.text import StreamDecoder, TextCodec


@pytest.fixture(scope="module")
def codec():
    return TextCodec(EMBEDDED_MODEL, 8192)


def with_template(folder, template, **fields):
    save_byte_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **fields}))
    return TextCodec(folder, 128)


def test_chat_template_of_the_embedded_model(codec):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert codec.render(messages) == "<|bos|><|system|>S<|user|>Hi<|assistant|>"
    assert codec.encode_chat(messages)[0] == 0


@pytest.mark.parametrize("text", ["Hello, world!", "naïve café", "日本語 🐶 emoji", "a\n\n b\t", ""])
def test_streamed_text_equals_whole_text(codec, text):
    decoder = StreamDecoder(codec)
    pieces = [decoder.push(token) for token in codec.encode(text)]
    assert "".join(pieces) + decoder.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end(codec):
    tokens = codec.encode("🐶")
    assert len(tokens) > 1
    decoder = StreamDecoder(codec)
    assert decoder.push(tokens[0]) == ""
    assert decoder.flush() == "\ufffd"


def test_a_decoder_that_strips_the_first_space_keeps_it_in_an_answer(tmp_path):
    vocab = {"<unk>": 0, "\u2581a": 1, "b": 2, "\u2581Pa": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path, 4)
    assert codec.decode([1, 2, 3]) == "ab Pa"
    assert StreamDecoder(codec, [1, 2]).push(3) == " Pa"


def test_documents_start_and_end_as_in_training(codec):
    tokens = codec.encode_document("Once")
    assert tokens[0] == 0 and tokens[-1] == 1 and codec.decode(tokens) == "Once"


def test_missing_template_says_what_to_do(tmp_path):
    save_byte_tokenizer(tmp_path)
    codec = TextCodec(tmp_path, 128)
    assert not codec.has_chat_template
    with pytest.raises(InputError, match="hybrid generate"):
        codec.encode_chat([])


@pytest.mark.parametrize("template", ["{% broken", 7, "a" * 10**6])
def test_a_broken_template_stops_only_chat(template, tmp_path):
    codec = with_template(tmp_path, template)
    assert codec.decode(codec.encode("Hi")) == "Hi" and codec.decode(codec.encode_document("Hi")) == "Hi"
    for use in (lambda: codec.has_chat_template, lambda: codec.encode_chat([{"role": "user", "content": "Hi"}])):
        with pytest.raises(ModelError, match=r"the chat template in .*tokenizer_config\.json"):
            use()


@pytest.mark.parametrize("prompt", [b"ab", ["a"], [1.5], None, 5, [None]])
def test_what_is_no_prompt(prompt, codec):
    with pytest.raises(InputError, match="expected text, or whole numbers that are token ids"):
        codec.encode_prompt(prompt, enough=10)


def test_prompts_are_text_or_ids(codec):
    ids = codec.encode("Hello")
    for prompt in ("Hello", ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        assert codec.encode_prompt(prompt, enough=10) == ids
    with pytest.raises(InputError, match="the prompt has 16,777,217 characters, at most 16,777,216 are taken"):
        codec.encode_prompt("a" * (2**24 + 1), enough=10)


def test_damaged_tokenizers(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        TextCodec(tmp_path, 128)
    save_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        TextCodec(tmp_path, 128)
