"""What lies beside a model's own tensors: known to be harmless, plainly of no part in the answer, or refused."""

import json
import shutil

import pytest
import torch
from model_cases import make_model
from packed_cases import pack
from safetensors.torch import load_file, save_file

from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import ModelError
from hybrid.formats.packed import PackedModel
from hybrid.model.ffn import FFNRuntime
from hybrid.model.loader import ModelFolder

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name in ("llama-relu", "llama-tied-mha-bias", "opt"):
        folders[name] = tmp_path_factory.mktemp(name)
        make_model(name, folders[name])
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["llama-relu"], tmp_path / "model")


def change(folder, add=None, drop=(), **config):
    """Add and drop tensors of a model's folder, and fields of its config.json."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors | (add or {}), path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def logits(folder, tokens):
    opened = ModelFolder.open(folder)
    model = opened.build(FFNRuntime("dense", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)
    with torch.inference_mode():
        return model.logits(model(tokens))


def error(found, truth):
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.sin_cached",
    ],
)
def test_rotary_caches_are_accepted_without_a_word(folder, name):
    change(folder, {name: torch.ones(2, 64)})
    assert ModelFolder.open(folder).notices == ()


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "score.weight",
        "model.layers.0.self_attn.k_scale",
        "model.layers.2.self_attn.attn.v_scale",
        "model.layers.2.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.masked_bias",
    ],
)
def test_what_has_no_part_in_the_answer_is_ignored_with_a_notice(folder, name, saved):
    before = logits(folder, torch.arange(9))
    second = name.replace("weight", "bias").replace("layers.0", "layers.1")
    change(folder, {name: torch.ones(2, 64).to(torch.float8_e4m3fn), second: torch.ones(1, dtype=torch.int64)})
    (notice,) = ModelFolder.open(folder).notices
    shown = f"'{min(name, second)}' and 1 more" if name != second else f"'{name}'"
    assert shown in notice and notice.endswith("is ignored")
    assert torch.equal(logits(folder, torch.arange(9)), before)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lm_head.lora_A.weight", "merge the adapter into the weights first"),
        ("model.layers.0.mlp.up_proj.lora_B.default.weight", "merge the adapter"),
        ("model.layers.0.mlp.up_proj.base_layer.weight", "merge the adapter"),
        ("model.layers.0.mlp.up_proj.weight_scale", "give the model in bf16, f16 or f32"),
        ("model.layers.0.self_attn.k_proj.qzeros", "give the model in bf16, f16 or f32"),
        ("lm_head.bias", "save_pretrained of transformers leaves out"),
        ("model.layers.0.self_attn.q_proj.bias", "save_pretrained of transformers leaves out"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "save_pretrained of transformers leaves out"),
        ("odd\nname", "save_pretrained of transformers leaves out"),
    ],
)
def test_what_may_have_a_part_is_refused_with_a_remedy(folder, name, remedy):
    change(folder, {name: torch.ones(2, 64)})
    with pytest.raises(ModelError) as caught:
        ModelFolder.open(folder)
    message = str(caught.value)
    assert f"has tensor {name!r} that config.json gives no place to" in message and remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["llama-tied-mha-bias", "opt"])
def test_a_stored_head_that_differs_from_a_tied_embedding_is_used(saved, name, tmp_path):
    folder = shutil.copytree(saved[name], tmp_path / "model")
    change(folder, {"lm_head.weight": torch.randn(131, 48)})
    truth = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    opened, tokens = ModelFolder.open(folder), torch.arange(30)
    assert not opened.spec.tied and len(opened.notices) == 1 and "the stored one is used" in opened.notices[0]
    expected = truth(tokens[None]).logits[0].detach()
    assert error(logits(folder, tokens), expected) < 1e-4
    pack(folder, tmp_path / "packed", "f16")
    assert not PackedModel.open(tmp_path / "packed").spec.tied
    assert error(logits(tmp_path / "packed", tokens), expected) < 1e-2


def test_the_same_head_again_or_alone_is_the_tied_one(saved, tmp_path):
    folder = shutil.copytree(saved["llama-tied-mha-bias"], tmp_path / "model")
    expected = logits(folder, torch.arange(30))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for drop in ((), ("model.embed_tokens.weight",)):  # some tools keep the first name by alphabet
        change(folder, {"lm_head.weight": embedding.clone()}, drop)
        opened = ModelFolder.open(folder)
        assert opened.spec.tied and opened.notices == ()
        assert torch.equal(logits(folder, torch.arange(30)), expected)
    pack(folder, tmp_path / "packed", "bf16")
    assert error(logits(tmp_path / "packed", torch.arange(30)), expected) < 3e-2


def test_a_head_of_another_shape_is_not_the_tied_one(saved, tmp_path):
    folder = shutil.copytree(saved["opt"], tmp_path / "model")
    change(folder, {"lm_head.weight": torch.zeros(132, 48)})
    with pytest.raises(ModelError, match=r"'lm_head.weight' has shape \[132, 48\], config.json asks for \[131, 48\]"):
        ModelFolder.open(folder)


def test_an_embedding_is_no_head_where_they_are_not_tied(folder):
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        change(folder, {"model.norm.weight": torch.ones(48)}, drop=[name])
        with pytest.raises(ModelError, match=r"no tensor '(lm_head|model\.embed_tokens)\.weight'"):
            ModelFolder.open(folder)
