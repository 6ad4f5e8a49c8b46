"""Tokenizers as PowerInfer's metadata."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hybrid.formats.powerinfer_tokens import tokenizer_metadata
from hybrid.formats.text import TextCodec

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def codec(folder, model, vocab_size):
    """A folder's codec with an end token, one that a user added, and a template."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.add_tokens([AddedToken("user")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextCodec(folder, vocab_size)


def test_byte_level_bpe(tmp_path):
    model = models.BPE({"a": 0, "b": 1, "ab": 2, "abab": 3}, [("a", "b"), ("ab", "ab")])
    found = tokenizer_metadata(codec(tmp_path, model, 8), 8)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "ab", "abab", "<end>", "user", "[unused6]", "[unused7]"]
    assert found["tokenizer.ggml.token_type"].tolist() == [NORMAL] * 4 + [CONTROL, USER, NORMAL, NORMAL]
    assert found["tokenizer.ggml.merges"] == ["a b", "ab ab"]
    assert found["tokenizer.ggml.eos_token_id"] == 4 and "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert Tokenizer.from_str(found["tokenizer.huggingface.json"]).encode("abab").ids == [3]


def test_pieces_with_bytes_get_scores_by_their_merges(tmp_path):
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ba": 4, "ab": 5}
    model = models.BPE(vocab, [("a", "b"), ("b", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    found = tokenizer_metadata(codec(tmp_path, model, 8), 8)
    assert found["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in found
    assert found["tokenizer.ggml.scores"].tolist() == [0, 0, 0, 0, -1, 0, 0, 0]
    assert found["tokenizer.ggml.token_type"].tolist() == [UNKNOWN, BYTE, *[NORMAL] * 4, CONTROL, USER]


@pytest.mark.parametrize("size", [5, 6])
def test_tokens_beyond_the_models_embeddings_are_left_out(size, tmp_path):
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    found = tokenizer_metadata(codec(tmp_path, model, size), size)
    assert len(found["tokenizer.ggml.tokens"]) == size
    assert found["tokenizer.ggml.tokens"][:5] == ["a", "b", "ab", "<end>", "user"]
