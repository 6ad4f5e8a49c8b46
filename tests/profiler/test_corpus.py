"""Calibration text: formats, refusals, windows."""

import json

import numpy as np
import pytest

from profiler.common.errors import CorpusError
from profiler.corpus import Document, corpus_hash, read_documents, token_windows


def encode(document):
    return [ord(c) for c in document.text]


def test_jsonl_of_both_kinds_and_blank_lines(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "abc"}) + "\n\n" + json.dumps({"messages": chat, "source": "x"}) + "\n")
    assert read_documents([path]) == [Document("abc"), Document(messages=(chat[0],))]


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    path = tmp_path / "book.txt"
    text = "\n\n".join(f"Paragraph {n} " + "word " * 200 for n in range(20))
    path.write_text(text)
    documents = read_documents([path])
    assert len(documents) > 3 and "\n\n".join(d.text for d in documents) == text


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("first")
    (tmp_path / "model.safetensors").write_bytes(b"\0")
    assert [d.text for d in read_documents([tmp_path])] == ["first", "second"]


@pytest.mark.parametrize("newline", ["\n\n", "\r\n\r\n", "\n"])
def test_any_kind_of_line_ends_gives_several_documents(tmp_path, newline):
    path = tmp_path / "book.txt"
    path.write_bytes(newline.join("word " * 100 for _ in range(40)).encode())
    documents = read_documents([path])
    assert len(documents) > 3 and sum(d.text.count("word") for d in documents) == 4000


def test_jsonl_with_a_byte_order_mark_and_unicode_line_separators(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\r\n', encoding="utf-8", newline="")
    assert [d.text for d in read_documents([path])] == ["a\u2028b\u0085c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"", "empty corpus"),
        ("e.txt", b" \n\n \n", "empty corpus"),
        ("e.jsonl", b"\n", "empty corpus"),
        ("e.jsonl", b'{"text": ""}\n{"messages": []}', "empty corpus"),
        ("j.jsonl", b"[" * 100000, "line 1 is not JSON"),
        ("b.txt", b"ab\0cd", "is binary, expected UTF-8"),
        ("b.txt", b"\xff\xfe\x01", "is binary, expected UTF-8"),
        ("j.jsonl", b'{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("j.jsonl", b'{"title": "a"}', "line 1 has neither `text` nor `messages`"),
        ("j.jsonl", b'{"messages": [{"role": "user"}]}', "line 1 has neither"),
        ("j.jsonl", b"[1]", "line 1 has neither"),
    ],
)
def test_bad_input_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents([path])
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CorpusError, match="is a model folder; put MODEL before --corpus"):
        read_documents([tmp_path / "model"])
    with pytest.raises(CorpusError, match="does not exist"):
        read_documents([tmp_path / "no"])
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CorpusError, match=r"no text in .* expected \.txt"):
        read_documents([tmp_path])


def test_windows_are_fixed_seeded_and_know_their_documents():
    documents = [Document(chr(65 + n) * (5 + n)) for n in range(10)]
    windows = token_windows(documents, encode, 8, 40, seed=1)
    assert windows.tokens.shape == windows.documents.shape == (5, 8)
    assert (windows.tokens == windows.documents + 65).all()
    assert (token_windows(documents, encode, 8, 40, seed=1).tokens == windows.tokens).all()
    assert (token_windows(documents, encode, 8, 40, seed=2).tokens != windows.tokens).any()


def test_a_corpus_smaller_than_asked_gives_what_it_has_but_at_least_one_window():
    documents = [Document("abcdef")]
    assert token_windows(documents, encode, 4, 10**6, 0).count == 1
    with pytest.raises(CorpusError, match="6 tokens, expected at least one window of 7"):
        token_windows(documents, encode, 7, 100, 0)


def test_hash_follows_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = corpus_hash([path])
    path.write_text("two")
    assert corpus_hash([path]) != first
    assert len(np.unique([first, corpus_hash([path])])) == 2
