"""Tokenizer, chat template and streaming decode."""

import json

import jinja2
import pytest
from model_cases import save_byte_tokenizer
from tokenizers import Tokenizer, decoders, models

from hybrid.errors import InputError, ModelError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.text import StreamDecoder, TextCodec, generation_defaults


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


def test_template_from_its_own_file_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("F{{ messages[0]['content'] }}")
    assert with_template(tmp_path, "C").render([{"role": "user", "content": "x"}]) == "Fx"


def test_named_templates(tmp_path):
    codec = with_template(tmp_path, [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}])
    assert codec.render([]) == "D"


def test_special_tokens_reach_the_template(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<map>"}, "eos_token": "E"}))
    assert with_template(tmp_path, "{{ bos_token }}{{ eos_token }}", bos_token="<own>").render([]) == "<own>E"


def test_templates_are_sandboxed_and_may_refuse(tmp_path):
    codec = with_template(tmp_path, "{{ raise_exception('only user messages') }}")
    with pytest.raises(InputError, match="refuses these messages: only user messages"):
        codec.render([])
    codec = with_template(tmp_path, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(InputError, match="unsafe") as caught:
        codec.render([])
    assert isinstance(caught.value.__cause__, jinja2.sandbox.SecurityError)


def test_missing_template_says_what_to_do(tmp_path):
    save_byte_tokenizer(tmp_path)
    codec = TextCodec(tmp_path, 128)
    assert not codec.has_chat_template
    with pytest.raises(InputError, match="hybrid generate"):
        codec.encode_chat([])


def test_damaged_tokenizers(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        TextCodec(tmp_path, 128)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="has token id 127, the model has 100"):
        TextCodec(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        TextCodec(tmp_path, 128)


def test_generation_defaults(tmp_path):
    settings, ends = generation_defaults(EMBEDDED_MODEL)
    assert (settings.temperature, settings.top_k, settings.top_p, ends) == (0.7, 40, 0.95, [1, 2])
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert generation_defaults(tmp_path)[0].greedy and generation_defaults(tmp_path)[1] == [7]
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": -1, "eos_token_id": 5}')
    with pytest.raises(ModelError, match="temperature is"):
        generation_defaults(tmp_path)
