"""Model folders that are incomplete or damaged: one clear line each."""

import json
import shutil

import pytest
from model_cases import make_model

from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import ModelError
from hybrid.model.ffn import FFNRuntime
from hybrid.model.loader import ModelFolder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("llama-relu", folder, shard_size="60KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        opened = ModelFolder.open(folder)
        opened.build(FFNRuntime("dense", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_the_undamaged_copy_loads(folder):
    assert ModelFolder.open(folder).spec.n_layers == 3 and len(shards(folder)) > 2


def test_missing_folder(tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "\x00\x01"])
def test_corrupt_config(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_missing_shard(folder):
    gone = shards(folder)[1]
    gone.unlink()
    assert f"shard {gone.name} is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(folder, keep):
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert shard.name in refusal(folder)


def test_random_bytes_instead_of_a_shard(folder):
    shards(folder)[0].write_bytes(bytes(range(256)) * 50)
    assert "is not a whole safetensors file" in refusal(folder)


def test_no_weights_at_all(folder):
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    assert "no weights to load" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "save the model as safetensors" in refusal(folder)


def test_index_without_a_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no 'weight_map'" in refusal(folder)


def test_shapes_that_contradict_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 84}))
    assert "has shape [85, 48], config.json asks for [84, 48]" in refusal(folder)


def test_a_tensor_that_the_config_needs_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "no tensor 'model.layers.3." in refusal(folder)


def test_a_tensor_without_a_place_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "has tensor 'model.layers.2." in refusal(folder)
