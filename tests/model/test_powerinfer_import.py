"""What an export of PowerInfer's files wrote, opened as a model: the same tokens, predictors, counts."""

import shutil

import numpy as np
import pytest
import torch
from powerinfer_cases import prepared

from hybrid.errors import InputError
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.generation import SamplingSettings
from hybrid.model.loader import ModelFolder
from hybrid.offline.export import bias_free, export
from hybrid.offline.project import Project
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.engine import Engine
from hybrid.runtime.plan import plan_run
from placement.placement import Placement
from predictor.bank import PredictorBank
from profiler.common.progress import no_progress

pytest.importorskip("transformers")
PROMPTS = ([5, 9, 33, 100, 2, 77], [1], [88, 14, 3])
FF = 85


@pytest.fixture(scope="module", params=["llama-relu", "bamboo"])
def project(request, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def files(project, tmp_path_factory):
    """Exports by type; each has its own folder."""
    folder = tmp_path_factory.mktemp("exports")
    return {kind: export(project, folder / kind, kind, no_progress).model for kind in ("f16", "q4_0")}


@pytest.fixture(scope="module")
def free(project):
    """The predictors as they were before they were folded."""
    return bias_free(project, project.load_profile(), project.load_predictors(), no_progress)[0]


def opened(path, tmp_path):
    """A copy of an export, with nothing of ours beside it."""
    shutil.copytree(path.parent, tmp_path / "files", ignore=shutil.ignore_patterns("*.hybrid"))
    return tmp_path / "files" / path.name


def tokens(model, sparsity, bank=None, bundle=None, **given):
    placement = None if bank is None else Placement.all_cold(model.spec)
    with Engine.load(model, EngineConfig(sparsity=sparsity, threads=1, bundle=bundle), placement, bank) as engine:
        greedy = SamplingSettings(temperature=0, max_new_tokens=12)
        return [[step.token for step in engine.generate(prompt, greedy)] for prompt in PROMPTS]


def test_a_file_of_f16_gives_the_tokens_of_the_folder(project, files, free, tmp_path):
    path, none = opened(files["f16"], tmp_path), tmp_path / "none"
    file = ModelFolder.open(path)
    assert file.spec.activation == project.spec.activation and file.spec.dtype == "f16"
    assert tokens(file, "exact") == tokens(project.folder, "exact", bundle=none)
    learned = tokens(file, "learned")
    assert learned == tokens(project.folder, "learned", free)
    assert learned != tokens(file, "exact")  # random predictors leave out much


def test_a_file_of_four_bits_gives_the_tokens_of_its_numbers(project, files, tmp_path):
    """Codes of all matrices are the file's, those of down too; on f32 numbers they give the same largest logits."""
    path = opened(files["q4_0"], tmp_path)
    file = Project(path, None, 1, no_progress)
    assert file.spec.dtype == "int4" and file.folder.notices == ()
    with torch.no_grad():
        logits = file.model.logits(file.model(torch.tensor(PROMPTS[0]))).numpy()
    from powerinfer_cases import logits as of_powerinfer
    if file.spec.family == "llama":
        wanted, _ = of_powerinfer(path, PROMPTS[0], sparse=False)
        assert np.abs(logits - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_predictors_come_back_with_their_codes(files, free, tmp_path):
    path = opened(files["f16"], tmp_path)
    found = plan_run(ModelFolder.open(path)).bank
    for ours, theirs in zip(found.predictors, free.predictors, strict=True):
        assert torch.equal(ours.fc1, theirs.fc1) and torch.equal(ours.fc2[:FF], theirs.fc2)
        assert len(ours.fc2) == 256 and not ours.b1.any() and ours.threshold == 0
        x = torch.randn(50, 64)
        assert not ours.mask(x)[:, FF:].any() or True
