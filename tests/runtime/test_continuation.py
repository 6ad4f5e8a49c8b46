"""Texts that a small model continues side by side."""

import numpy as np
import pytest
from model_cases import make_model

from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.offline.project import Project
from hybrid.runtime import continuation
from hybrid.runtime.continuation import continued
from profiler.common.errors import InputError
from profiler.common.progress import no_progress

pytest.importorskip("transformers")
GREEDY, DRAWN = SamplingSettings(temperature=0), SamplingSettings(temperature=1, top_k=0, top_p=1, seed=3)
PROMPTS = np.random.default_rng(0).integers(0, 128, (5, 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama-relu", path)
    return path


@pytest.fixture(scope="module")
def project(folder, tmp_path_factory):
    return Project(folder, tmp_path_factory.mktemp("bundle"), 1, no_progress)


def write(project, settings, prompts=PROMPTS, strategy="exact", length=20):
    told = []
    texts = continued(project.model, project.runtime, strategy, prompts, length, settings, told.append)
    return texts, sum(told)


def test_each_text_is_what_an_engine_makes_of_its_prompt(project, folder):
    texts, told = write(project, GREEDY)
    assert texts.shape == (5, 20) and told == 5 * 14 and np.array_equal(texts[:, :6], PROMPTS)
    settings = SamplingSettings(temperature=0, max_new_tokens=14)
    with Engine.load(folder, EngineConfig("dense", threads=1)) as engine:
        for text in texts.tolist():
            alone = [step.token for step in engine.generate(text[:6], settings)]
            assert text[6 : 6 + len(alone)] == alone  # an end token ends the engine's
    assert np.array_equal(write(project, GREEDY, strategy="dense")[0], texts)


def test_draws_are_repeatable_and_do_not_depend_on_company(project, monkeypatch):
    texts, _ = write(project, DRAWN)
    monkeypatch.setattr(continuation, "AT_ONCE", 2)
    assert np.array_equal(write(project, DRAWN)[0], texts)
    monkeypatch.setattr(continuation, "KV_BYTES", 1)  # too few for two
    assert np.array_equal(write(project, DRAWN)[0], texts)
    assert np.array_equal(write(project, DRAWN, PROMPTS[:1])[0], texts[:1])
    same = write(project, DRAWN, PROMPTS[[0, 0]])[0]
    assert not np.array_equal(same[0], same[1])


def test_the_runtime_is_put_back_also_after_an_error(project):
    before = project.runtime.strategy, project.runtime.as_decode
    with pytest.raises(InputError, match="this model takes 1 to"):
        write(project, GREEDY, length=100_000)
    write(project, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        stop = lambda count: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        continued(project.model, project.runtime, "exact", PROMPTS, 20, GREEDY, stop)
    assert (project.runtime.strategy, project.runtime.as_decode) == before
