"""What is said of long answers."""

import numpy as np
import pytest
import torch
from model_cases import make_model

from hybrid.offline.answers import answers_quality, beginnings, distinct_share, parted_after
from hybrid.offline.project import Project
from profiler.common.progress import no_progress
from profiler.corpus import TokenWindows

pytest.importorskip("transformers")


def test_prompts_are_how_documents_begin():
    owners = np.array([[7, 7, 7, 2, 2, 9], [9, 9, 9, 4, 4, 4]])
    found = beginnings(TokenWindows(np.arange(12).reshape(2, 6), owners), 3)
    assert found.tolist() == [[0, 1, 2], [5, 6, 7], [9, 10, 11]]  # one goes on in the next window, one is too short
    assert beginnings(TokenWindows(np.arange(12).reshape(2, 6), owners), 5).shape == (0, 5)


def test_where_answers_part():
    dense = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    found = np.array([[9, 2, 3], [1, 9, 3], [1, 2, 9], [1, 2, 3]])
    assert parted_after(found, dense).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "share"), [([], 1.0), ([1, 2, 3], 1.0), ([1, 2, 3, 4, 5], 1.0), ([7] * 13, 0.1), ([1, 2] * 4, 2 / 5)]
)
def test_runs_that_are_different(tokens, share):
    assert distinct_share(tokens) == pytest.approx(share)


def test_the_quality_of_answers_is_that_under_dense(tmp_path):
    truth = make_model("llama-relu", tmp_path)
    project = Project(tmp_path, tmp_path / "bundle", 1, no_progress)
    texts = np.random.default_rng(0).integers(0, 128, (3, 14))
    dense = texts.copy()
    dense[0, 4], dense[1, 9] = (dense[0, 4] + 1) % 128, (dense[1, 9] + 1) % 128
    first, found = answers_quality(project.model, project.runtime, ["dense", "learned"], [dense, texts], 4)
    with torch.no_grad():
        logs = truth(torch.from_numpy(texts)).logits.log_softmax(-1)[:, :-1]
    losses = -logs.gather(2, torch.from_numpy(texts)[:, 1:, None])[:, 3:, 0]
    assert (found.answers, found.tokens, found.parted, found.same) == (3, 10, 5.0, 1)
    assert found.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-3)
    assert found.perplexity_of_ends == pytest.approx(float(losses[:, 5:].mean().exp()), rel=1e-3)
    assert found.distinct == pytest.approx(1.0)
    assert (first.strategy, first.parted, first.same) == ("dense", 10.0, 3) and first.perplexity != found.perplexity
