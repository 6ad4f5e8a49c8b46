"""Which files are a corpus, and how documents become windows of tokens."""

import json
import os
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from profiler.common.errors import CorpusError, InputError
from profiler.corpus import CorpusUse, Skipped, corpus_files, corpus_hash, read_documents, token_windows
from profiler.documents import Document


def encode(document, most):
    return [ord(c) for c in document.text[:most]]


def texts(*paths):
    return [document.text for document in read_documents(paths, Skipped())]


def windows(documents, *arguments, encode=encode, **options):
    return token_windows(lambda bad: iter(documents), encode, *arguments, **options)


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    (tmp_path / "b.TXT").write_text("second")
    (tmp_path / "c.json").write_text('[{"text": "third"}]')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("first")
    (tmp_path / "model.safetensors").write_bytes(b"\0")
    assert texts(tmp_path) == ["first", "second", "third"]
    assert texts(tmp_path / "c.json", tmp_path / "b.TXT") == ["third", "second"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.txt", ""),
        ("e.txt", " \n\n \n"),
        ("e.jsonl", "\n"),
        ("e.jsonl", '{"text": ""}\n{"messages": []}'),
        ("e.json", "[]"),
    ],
)
def test_an_empty_corpus_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CorpusError, match=rf"{name}: empty corpus, no text found"):
        texts(path)


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CorpusError, match="is a model folder; put MODEL before --corpus"):
        texts(tmp_path / "model")
    with pytest.raises(CorpusError, match="does not exist"):
        texts(tmp_path / "no")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CorpusError, match=r"no text in .* expected \.txt"):
        texts(tmp_path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/zero")):
        for use in (texts, lambda path: corpus_hash([path])):
            with pytest.raises(CorpusError, match="is no regular file"):
                use(path)
    (tmp_path / "a.txt").write_text("a")
    assert texts(tmp_path) == ["a"]


@pytest.mark.skipif(not Path("/proc/kmsg").is_file(), reason="needs Linux's /proc")
def test_files_of_the_kernels_that_never_end_are_empty(tmp_path):
    assert corpus_files([Path("/proc/kmsg")]) == [] and len(corpus_hash([Path("/proc/kmsg")])) == 16
    with pytest.raises(CorpusError, match="/proc/kmsg: empty corpus"):
        texts(Path("/proc/kmsg"))


def test_windows_are_fixed_seeded_and_know_their_documents():
    documents = [Document(chr(65 + n) * (5 + n)) for n in range(10)]
    found = windows(documents, 8, 40, 1)
    assert found.tokens.shape == found.documents.shape == (5, 8)
    assert (found.tokens == found.documents + 65).all()
    assert found.use == CorpusUse(documents=10, used=len(np.unique(found.documents)))
    assert (windows(documents, 8, 40, 1).tokens == found.tokens).all()
    assert (windows(documents, 8, 40, 2).tokens != found.tokens).any()


def test_documents_come_in_the_order_of_the_seeds_permutation():
    documents = [Document(chr(65 + n) * 4) for n in range(10)]
    found = windows(documents, 4, 40, seed=3)
    assert found.documents[:, 0].tolist() == np.random.default_rng(3).permutation(10).tolist()


def test_a_corpus_smaller_than_asked_gives_what_it_has_but_at_least_one_window():
    documents = [Document("abcdef")]
    assert windows(documents, 4, 10**6, 0).count == 1
    with pytest.raises(CorpusError, match="6 tokens, expected at least one window of 7"):
        windows(documents, 7, 100, 0)


def test_more_text_is_read_where_tokens_are_long():
    documents = [Document(chr(65 + n) * 5000) for n in range(10)]
    asked = []

    def rarely(document, most):
        asked.append(document.characters)
        return [ord(c) for c in document.text[::500][:most]]

    found = windows(documents, 10, 50, 0, encode=rarely)
    assert found.tokens.shape == (5, 10) and len(np.unique(found.documents)) == 5
    assert asked[0] == 400  # 8 characters a token
    assert windows(documents, 10, 10**4, 0, encode=rarely).count == 10  # all that there is


def test_no_more_is_encoded_or_kept_than_is_wanted():
    asked = []

    def watched(document, most):
        asked.append((document.characters, most))
        return encode(document, most)

    tracemalloc.start()
    try:
        # 20 MB, of which one document at a time is there
        found = token_windows(lambda bad: (Document("word " * 20_000) for _ in range(200)), watched, 64, 4096, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tokens.size == 4096 and asked == [(8 * 4096, 4096)]
    assert peak < 1.5e6


BAD = [{"text": "a" * 50}, {"text": "\ud83d" * 9}, {"title": "x"}, {"text": "b" * 50}]


def test_bad_documents_end_the_run_with_file_and_line_or_are_counted(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in BAD))
    read = partial(read_documents, [path])
    with pytest.raises(
        CorpusError, match=r"c\.jsonl:2 is not valid Unicode.*or leave such documents out with --skip-bad"
    ):
        token_windows(read, encode, 10, 100, 0)
    found = token_windows(read, encode, 10, 100, 0, skip_bad=True)
    assert set(found.tokens.ravel()) == {97, 98} and found.use.documents == 2 and found.use.skipped == 2
    assert found.use.first_skipped.startswith(f"{path}:2 is not valid Unicode")


def test_documents_that_cannot_be_encoded_are_bad_too(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 10}) + "\n" for letter in "abxc"))

    def refusing(document, most):
        if "x" in document.text:
            raise InputError("the template refuses this")
        return encode(document, most)

    read = partial(read_documents, [path])
    with pytest.raises(CorpusError, match=r"c\.jsonl:3: the template refuses this; correct it, or .* --skip-bad"):
        token_windows(read, refusing, 10, 100, 0)
    found = token_windows(read, refusing, 10, 100, 0, skip_bad=True)
    assert found.use == CorpusUse(4, 3, 1, f"{path}:3: the template refuses this")


def test_hash_follows_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = corpus_hash([path])
    path.write_text("two")
    assert corpus_hash([path]) != first
    assert len({first, corpus_hash([path])}) == 2
