"""Windows of a model's own text: what they are made of, and what an interrupt leaves."""

import numpy as np
import pytest

from hybrid.offline import own_text
from hybrid.offline.own_text import own_windows
from profiler.common.artifact import ArtifactHeader
from profiler.common.progress import no_progress
from profiler.corpus import TokenWindows

HEADER = ArtifactHeader("neuron profile", "0123456789abcdef", {"corpus": "abc", "window": 16})
CORPUS = TokenWindows(np.arange(50 * 16).reshape(50, 16), np.repeat(np.arange(400, dtype=np.int32), 2).reshape(50, 16))


class Model:
    """Continues a text by its seed, its last token and the place; is interrupted after so many texts."""

    def __init__(self, most=1000):
        self.asked, self.most = [], most

    def __call__(self, prompts, length, seed, advance):
        if sum(self.asked) + len(prompts) > self.most:
            raise KeyboardInterrupt
        self.asked.append(len(prompts))
        advance(prompts.size)
        seeds = seed + np.arange(len(prompts))
        made = seeds[:, None] * 1000 + prompts[:, -1:] + np.arange(length - prompts.shape[1])
        return np.concatenate([prompts, made], axis=1)


def own(path, model, count=40, header=HEADER, seed=5):
    return own_windows(CORPUS, count, model, seed, path, header, no_progress)


def test_windows_begin_as_the_corpus_and_belong_to_its_documents(tmp_path):
    model = Model()
    found = own(tmp_path / "partial", model)
    assert np.array_equal(found.tokens[:, :2], CORPUS.tokens[:40, :2]) and model.asked == [16, 16, 8]
    assert found.tokens[17, 2] == (5 + 17) * 1000 + CORPUS.tokens[17, 1]  # each text has a seed of its own
    assert np.array_equal(found.documents, np.repeat(CORPUS.documents[:40, 1:2], 16, axis=1))
    assert CORPUS.documents[0, -1] == 7  # the corpus's own are as they were


def test_an_interrupted_text_goes_on_where_it_ended(tmp_path):
    path, whole = tmp_path / "partial", own(tmp_path / "whole", Model())
    with pytest.raises(KeyboardInterrupt, match="32 of 40 texts are kept, run it again to go on"):
        own(path, Model(most=32))
    model = Model()
    found = own(path, model)
    assert model.asked == [8] and np.array_equal(found.tokens, whole.tokens)


def test_a_killed_run_has_what_was_kept_now_and_then(tmp_path, monkeypatch):
    path, model = tmp_path / "partial", Model()
    own(path, model)
    assert not path.exists()  # it did not take long
    monkeypatch.setattr(own_text, "_SAVE_SECONDS", -1.0)
    own(path, model)
    own(path, model := Model())
    assert model.asked == []


def test_without_a_whole_group_nothing_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        own(tmp_path / "partial", Model(most=3))
    assert not (tmp_path / "partial").exists()


def test_what_was_made_for_another_profile_or_is_damaged_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "_SAVE_SECONDS", -1.0)
    path = tmp_path / "partial"
    own(path, Model())
    for header in (
        ArtifactHeader(HEADER.kind, HEADER.model_fingerprint, {"corpus": "other", "window": 16}),
        ArtifactHeader(HEADER.kind, "another", HEADER.made_from),
    ):
        own(path, model := Model(), header=header)
        assert sum(model.asked) == 40
    path.write_bytes(path.read_bytes()[:-1])
    own(path, model := Model())
    assert sum(model.asked) == 40
