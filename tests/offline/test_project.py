"""The offline steps over a small model: what is said of a corpus, what an interrupt leaves, what is put back."""

import json

import numpy as np
import pytest
import torch
from model_cases import make_model

from hybrid.offline import project as offline
from hybrid.offline.project import ProfileRequest, Project
from predictor.target import PredictorTarget
from profiler.common.errors import CorpusError, InputError
from profiler.common.progress import no_progress
from profiler.documents import Document

pytest.importorskip("transformers")
TEMPLATE = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"""
TARGET = PredictorTarget(max_perplexity_increase=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama-relu", path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture
def said():
    return []


@pytest.fixture
def project(folder, said, tmp_path):
    return Project(folder, tmp_path / "bundle", 1, no_progress, said.append)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (path,)


@pytest.fixture
def corpus(tmp_path):
    """60 documents of 40 tokens."""
    letters = "abcdefgh"
    texts = ("".join(letters[n * k % 7] for k in range(1, 41)) for n in range(60))
    return write(tmp_path / "c.jsonl", ({"text": text} for text in texts))


def test_a_corpus_is_summed_up(project, corpus, said):
    project.windows(ProfileRequest(corpus, tokens=330, window=32))
    assert said == ["corpus: 320 tokens of 8 of 60 documents"]


def test_a_corpus_with_less_than_was_asked_says_so(project, corpus, said):
    project.windows(ProfileRequest(corpus, tokens=100_000, window=32))
    assert said == [
        "corpus: 2,400 tokens of 60 of 60 documents",
        "note: that is all it has in whole windows of 32; 100,000 tokens were asked for",
    ]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"text": "half an emoji: \ud83d"}, r"c\.jsonl:2 is not valid Unicode"),
        ({"messages": [{"role": "system", "content": "S"}]}, r"c\.jsonl:2: .*System role not supported"),
    ],
)
def test_one_odd_document_is_named_or_left_out(project, said, tmp_path, odd, message):
    corpus = write(
        tmp_path / "c.jsonl", [{"text": "a" * 50}, odd, {"messages": [{"role": "user", "content": "b" * 50}]}]
    )
    with pytest.raises(CorpusError, match=message + r".*; correct it, or leave such documents out with --skip-bad"):
        project.windows(ProfileRequest(corpus, window=32))
    found = project.windows(ProfileRequest(corpus, window=32, skip_bad=True))
    assert found.use.used == 2
    assert said[-1].startswith(f"note: unusable and left out: 1 document, the first: {corpus[0]}:2")


def test_no_more_of_a_document_is_encoded_than_is_wanted(project):
    for document in (Document("a" * 1000), Document(messages=({"role": "user", "content": "a" * 1000},))):
        assert project.encode(document, 10) == project.encode(document, 2000)[:10]


def test_a_large_corpus_is_read_with_a_bar(project, corpus, monkeypatch):
    labels = []

    def progress(label, total, unit="token", done=0):
        labels.append((label, total, unit))
        return no_progress(label, total, unit, done)

    monkeypatch.setattr(offline, "_LONG_READ", 1000)
    monkeypatch.setattr(project, "_progress", progress)
    project.profile_origin(ProfileRequest(corpus, window=32))
    project.windows(ProfileRequest(corpus, window=32))
    # For its hash, to count documents, and to take some.
    assert labels == [("corpus", corpus[0].stat().st_size, "byte")] * 3


def test_a_profile_counts_and_keeps_the_models_own_text_too(project, corpus):
    asked = []

    def write(prompts, length, seed, advance):
        asked.append((prompts.shape, length, seed))
        return np.tile(prompts, length // prompts.shape[1])[:, :length]

    plain, request = (ProfileRequest(corpus, 2000, 32, own_text=count) for count in (0, 1000))
    found = project.profile(request, write)
    assert asked == [((16, 4), 32, 0), ((15, 4), 32, 16)] and not project.bundle.partial_own_text.exists()
    assert found.tokens == (62 + 31) * 32 and found.counts.max() <= found.tokens
    assert np.array_equal(found.validation, project.windows(plain).tokens[-16:])  # quality is measured on the corpus
    assert len(found.documents) > 2000 - 16 * 32  # samples are of both, more of them than of the corpus alone
    assert request.settings.sample_tokens == plain.settings.sample_tokens + 1000
    assert project.current_profile(request) and not project.current_profile(plain)
    project.profile(plain)
    assert project.current_profile(plain) and not project.current_profile(request)


def test_of_a_short_corpus_there_is_less_own_text(project, corpus):
    asked = []

    def write(prompts, length, seed, advance):
        asked.append(len(prompts))
        return np.tile(prompts, length // prompts.shape[1])[:, :length]

    found = project.profile(ProfileRequest(corpus, 100_000, 32, own_text=50_000), write)
    assert sum(asked) == 75 // 2 and found.tokens == (75 + 37) * 32


def test_more_own_text_than_half_the_corpus_is_refused(corpus):
    with pytest.raises(InputError, match="--own-text 1001 is more than half of --tokens 2000"):
        ProfileRequest(corpus, 2000, 32, own_text=1001)


def test_interrupted_steps_go_on_and_torchs_threads_are_put_back(project, corpus, monkeypatch):
    threads = torch.get_num_threads()
    project.profile(ProfileRequest(corpus, tokens=2000, window=32))
    found, whole = project.load_profile(), project.train(project.load_profile(), TARGET, 0)
    assert torch.get_num_threads() == threads
    project.bundle.predictors.unlink()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(project, "validation_perplexity", interrupt)
        with pytest.raises(KeyboardInterrupt, match="3 of 3 layers trained"):
            project.train(found, TARGET, 0)
    assert project.bundle.partial_predictors.is_file() and not project.bundle.predictors.is_file()
    with monkeypatch.context() as patch:
        patch.setattr("predictor.train._train_layer", lambda *_: pytest.fail("a layer was trained again"))
        again = project.train(found, TARGET, 0)
    assert again.report == whole.report and again.thresholds == whole.thresholds
    assert not project.bundle.partial_predictors.exists() and torch.get_num_threads() == threads
