"""The tokenizer of a model folder: tokens that other files than tokenizer.json add, and files that do not fit."""

import json

import pytest
from model_cases import save_byte_tokenizer

from hybrid.errors import InputError, ModelError
from hybrid.formats.text import TextCodec

CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def described(text, **flags):
    return {"content": text, **FLAGS, **flags}


def folder_with(path, **files):
    """The 128 byte symbols, and JSON files by their name without `.json`."""
    save_byte_tokenizer(path)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def codec_with(path, vocab_size=140, **files):
    config = {"chat_template": CHAT} | files.pop("tokenizer_config", {})
    return TextCodec(folder_with(path, tokenizer_config=config, **files), vocab_size)


@pytest.mark.parametrize(
    ("files", "start", "end"),
    [
        ({"added_tokens": {"<|im_start|>": 128, "<|im_end|>": 129}}, 128, 129),
        ({"added_tokens": {"<|im_end|>": 128, "<|im_start|>": 129}}, 129, 128),
        (
            {
                "tokenizer_config": {
                    "added_tokens_decoder": {"128": described("<|im_start|>"), "129": described("<|im_end|>")}
                }
            },
            128,
            129,
        ),
        ({"special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}}, 128, 129),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}}, 128, 129),
        ({"tokenizer_config": {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}}, 128, 129),
        ({"tokenizer_config": {"extra_special_tokens": {"a": "<|im_end|>", "b": "<|im_start|>"}}}, 129, 128),
        ({"tokenizer_config": {"eos_token": "<|im_end|>", "image_token": "<|im_start|>"}}, 129, 128),
    ],
)
def test_chat_markers_named_only_in_another_file_are_one_token(files, start, end, tmp_path):
    """As transformers numbers them."""
    codec = codec_with(tmp_path, **files)
    tokens = codec.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokens == [start, *codec.encode("Hi"), end]


@pytest.mark.parametrize(("flags", "shown"), [({}, "ab"), ({"special": False}, "a<x>b")])
def test_only_special_tokens_are_left_out_of_what_is_shown(flags, shown, tmp_path):
    codec = codec_with(tmp_path, tokenizer_config={"added_tokens_decoder": {"128": described("<x>", **flags)}})
    assert codec.decode(codec.encode("a<x>b")) == shown
    assert codec.special_ids(["<x>", "a", "<x>b", "nothing"]) == ({128} if not flags else set())


def test_a_plain_token_that_is_named_as_special_is_special(tmp_path):
    codec = codec_with(tmp_path, tokenizer_config={"eos_token": "Q"})
    assert codec.decode(codec.encode("aQ")) == "a" and codec.eos_tokens() == codec.encode("Q")


def test_flags_of_a_token_stay_when_its_part_is_named_too(tmp_path):
    config = {"added_tokens_decoder": {"128": described("<x>", lstrip=True)}, "pad_token": "<x>"}
    codec = codec_with(tmp_path, tokenizer_config=config)
    assert codec.encode("a  <x>") == [*codec.encode("a"), 128]


def test_the_map_of_special_tokens_wins_but_beside_added_tokens_decoder_it_is_not_read(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}"
    mapped = {"bos_token": {"content": "<map>"}, "eos_token": "E"}
    own = {"bos_token": "<own>", "chat_template": template}
    assert codec_with(tmp_path, tokenizer_config=own, special_tokens_map=mapped).render([]) == "<map>E"
    own["added_tokens_decoder"] = {}
    assert codec_with(tmp_path, tokenizer_config=own, special_tokens_map=mapped).render([]) == "<own>"


def test_a_token_without_an_embedding_matters_only_where_it_is_used(tmp_path):
    config = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "a"}
    codec = codec_with(tmp_path, 128, tokenizer_config=config)
    assert codec.decode(codec.encode("Hi")) == "Hi"
    with pytest.raises(InputError, match="'<pad>' with id 129, for which the model, with 128 embeddings, has none"):
        codec.encode("Hi<pad>")
    assert codec.eos_tokens() == [] and codec.encode_document("b") == codec.encode("ab")


def test_another_models_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has token id 127, the model has 100 embeddings"):
        codec_with(tmp_path, 100)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 130}}, "token '<x>' has id 130, which after those of tokenizer.json would be 128"),
        ({"added_tokens": {"<x>": "a"}}, "gives '<x>' the id a, expected a number"),
        ({"tokenizer_config": {"added_tokens_decoder": {"a": described("<x>")}}}, "expected tokens by their ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"128": 7}}}, "expected tokens by their ids"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "expected tokens by their ids"),
    ],
)
def test_files_that_contradict_each_other_or_make_no_sense(files, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        codec_with(tmp_path, **files)


def test_what_tokenizer_json_says_of_an_id_is_right(tmp_path):
    save_byte_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    first = next(text for text, number in vocab.items() if number == 0)
    codec = codec_with(tmp_path, added_tokens={"<left over>": 5, first: 99})
    assert codec.token_id("<left over>") is None and codec.token_id(first) == 0
