"""A prepared model as PowerInfer's files, and PowerInfer's arithmetic on them."""

import numpy as np
import pytest
import torch
from powerinfer_cases import logits, prepared, read_file
from predictor_cases import small_spec

from hybrid.errors import ArtifactError, InputError
from hybrid.offline.export import export, hot_index
from hybrid.offline.project import Project
from placement.placement import Placement
from profiler.common.progress import no_progress

pytest.importorskip("transformers")
LAYERS, FF, D = 12, 85, 64


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Twelve layers, so that their numbers sort otherwise than their names."""
    return prepared(tmp_path_factory.mktemp("tiny"), layers=LAYERS)


@pytest.fixture(scope="module")
def exported(project, tmp_path_factory):
    return export(project, tmp_path_factory.mktemp("out") / "files", "f16", no_progress)


def test_the_files_are_those_that_powerinfer_looks_for(project, exported):
    name = f"{project.folder.path.name}.powerinfer.gguf"
    folder = exported.model.parent
    assert {path.name for path in folder.iterdir()} == {name, f"{name}.generated.gpuidx", "activation"}
    counts = [f"activation_{layer}.pt" for layer in range(LAYERS)]
    assert sorted(path.name for path in (folder / "activation").iterdir()) == sorted(counts)
    assert exported.nbytes == exported.model.stat().st_size


def test_the_metadata_says_the_models_shape(project, exported):
    about, _, kinds = read_file(exported.model)
    of_llama = {name.removeprefix("llama."): value for name, value in about.items() if name.startswith("llama.")}
    assert of_llama == {
        "context_length": 64,
        "embedding_length": D,
        "block_count": LAYERS,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(project.spec.norm_eps),
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }
    assert (about["general.architecture"], about["powerinfer.sparse_threshold"]) == ("llama", 0.0)
    assert {kinds[f"blk.3.{part}.weight"] for part in ("ffn_down_t", "fc1", "fc2", "attn_q")} == {1}
    assert kinds["blk.3.ffn_norm.weight"] == kinds["output_norm.weight"] == 0


def test_its_arithmetic_gives_our_logits(project, exported):
    tokens = [5, 9, 33, 100, 2, 77]
    found, _ = logits(exported.model, tokens, sparse=False)
    with torch.no_grad():
        project.use_predictors(None)
        wanted = project.model.logits(project.model(torch.tensor(tokens))).numpy()
    assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()  # of f32 weights, in f16


def test_its_predictors_choose_what_is_reported(exported):
    _, stored, _ = read_file(exported.model)
    assert stored["blk.2.fc1.weight"].shape == (64, D) and stored["blk.2.fc2.weight"].shape == (256, 64)
    assert not stored["blk.2.ffn_gate.weight"][FF:].any() and stored["blk.2.ffn_gate.weight"][:FF].any()
    assert exported.after.rank == exported.before.rank + LAYERS
    assert 0 < exported.after.predicted_share < 1 and exported.perplexity_increase is not None


def test_each_layer_has_its_own_counts_and_hot_neurons(project, exported):
    found, placement = project.load_profile(), project.bundle.load_placement(project.spec)
    about, index, kinds = read_file(exported.model.with_name(f"{exported.model.name}.generated.gpuidx"))
    assert list(index)[:4] == ["blk.0.gpu_idx", "blk.0.gpu_bucket", "blk.1.gpu_idx", "blk.1.gpu_bucket"]
    assert set(kinds.values()) == {18} and about["generic.gpu_index.block_count"] == LAYERS
    for layer in range(LAYERS):
        counts = torch.load(exported.model.parent / "activation" / f"activation_{layer}.pt", weights_only=True)
        assert counts.tolist() == found.counts[layer].tolist() + [0] * (256 - FF)
        hot = sorted(placement.order[layer, : placement.hot[layer]].tolist())
        assert (
            index[f"blk.{layer}.gpu_bucket"].tolist() == hot == np.flatnonzero(index[f"blk.{layer}.gpu_idx"]).tolist()
        )
    assert about["split.vram_capacity"] == exported.hot * 3 * D * 2


def test_a_layer_that_is_all_hot_is_so_with_what_fills_it_up():
    spec = small_spec(d_model=64)
    tensors, about = hot_index(Placement.all_hot(spec), spec, "q4_0")
    assert tensors[1].values().tolist() == list(range(256)) and tensors[0].values().all()
    assert about["split.vram_capacity"] == 2 * 256 * 3 * 36
    tensors, about = hot_index(Placement.all_cold(spec), spec, "f16")
    assert tensors[1].shape == (0,) and not tensors[0].values().any() and about["split.vram_capacity"] == 0


def test_four_bits_keep_embedding_and_head_in_eight(project, tmp_path):
    _, _, kinds = read_file(export(project, tmp_path / "q", "q4_0", no_progress).model)
    assert kinds["token_embd.weight"] == kinds["output.weight"] == 8
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.11.attn_k.weight"] == 2 and kinds["blk.0.fc2.weight"] == 1


def test_an_export_replaces_one_of_the_same_model_alone(project, exported, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is there and no export of this model; choose another with --powerinfer"):
        export(project, tmp_path, "f16", no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / exported.model.name).write_text("old")
    again = export(project, tmp_path, "f16", no_progress)
    assert again.model.read_bytes() == exported.model.read_bytes()
    assert not (tmp_path / "mine").exists()


def test_a_model_that_is_not_prepared_says_so(project, tmp_path):
    bare = Project(project.folder.path, tmp_path / "none", 1, no_progress)
    with pytest.raises(ArtifactError, match="hybrid prepare"):
        export(bare, tmp_path / "out", "f16", no_progress)
    assert not (tmp_path / "out").exists()


def test_what_came_from_powerinfer_is_not_exported_again(exported, tmp_path):
    again = Project(exported.model, tmp_path / "bundle", 1, no_progress)
    with pytest.raises(InputError, match="is PowerInfer's already; to export other predictors, train some first"):
        export(again, tmp_path / "out", "f16", no_progress)
