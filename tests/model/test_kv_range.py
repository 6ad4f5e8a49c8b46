"""Keys and values that f16 does not hold are found from the weights and kept in f32."""

import shutil

import numpy as np
import pytest
import torch
from model_cases import make_model
from packed_cases import pack
from safetensors.torch import load_file, save_file

from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import ModelError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.packed import PackedModel
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.loader import ModelFolder
from placement.plan import VramPlan

transformers = pytest.importorskip("transformers")
KV = 16  # rows of k and of v of these models, 8 to a head


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name in ("llama-tied-mha-bias", "llama-relu", "qwen2", "qwen3", "opt"):
        folders[name] = tmp_path_factory.mktemp(name)
        make_model(name, folders[name], torch.bfloat16)
    return folders


def change(source, folder, edit):
    """A copy of a model with its tensors edited."""
    shutil.copytree(source, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def layer_parts(tensors, ending):
    return [name for name in tensors if name.endswith(ending)]


def large_bias(tensors):
    tensors[layer_parts(tensors, "1.self_attn.k_proj.bias")[0]][5] = -2e5


def small_values(tensors):
    """Values of about 1e-6, which the output projection makes up for."""
    for name in layer_parts(tensors, "v_proj.weight") + layer_parts(tensors, "v_proj.bias"):
        tensors[name] *= 1e-6
    for name in layer_parts(tensors, "o_proj.weight"):
        tensors[name] *= 1e6


def one_small_head(tensors):
    tensors[layer_parts(tensors, "2.self_attn.v_proj.weight")[0]][KV // 2 :] *= 1e-6


def one_large_row(tensors):
    tensors[layer_parts(tensors, "0.self_attn.v_proj.weight")[0]][7] *= 1e5


def large_norm(tensors):
    tensors[layer_parts(tensors, "0.input_layernorm.weight")[0]] *= 1e6


def large_key_norm(tensors):
    tensors[layer_parts(tensors, "0.self_attn.k_norm.weight")[0]][3] = 1e5


def large_norm_bias(tensors):
    tensors[layer_parts(tensors, "0.self_attn_layer_norm.bias")[0]][3] = 1e7


WIDE = [
    *(("qwen2", large_bias), ("qwen2", small_values), ("llama-relu", small_values), ("llama-relu", one_small_head)),
    *(("llama-relu", one_large_row), ("llama-relu", large_norm), ("qwen3", large_key_norm), ("opt", large_norm_bias)),
]


@pytest.mark.parametrize(("name", "edit"), WIDE, ids=[f"{name}-{edit.__name__}" for name, edit in WIDE])
def test_a_model_beyond_f16_keeps_f32(saved, name, edit, tmp_path):
    opened = ModelFolder.open(change(saved[name], tmp_path / "model", edit))
    spec = opened.spec
    assert (spec.dtype, spec.wide_kv, spec.kv_element_bytes) == ("bf16", True, 4)
    assert KVCache(spec, 8).data.dtype == np.float32
    assert len(opened.notices) == 1 and "kept in f32" in opened.notices[0]


def zero_head(tensors):
    tensors[layer_parts(tensors, "0.self_attn.v_proj.weight")[0]][: KV // 2] = 0


def one_small_row(tensors):
    """Among others of its head that dwarf it."""
    tensors[layer_parts(tensors, "0.self_attn.v_proj.weight")[0]][3] *= 1e-7


def large_but_held(tensors):
    tensors[layer_parts(tensors, "0.self_attn.v_proj.weight")[0]][3] *= 1e2


def small_start(tensors):
    """Of a head, rows that are looked at first."""
    tensors[layer_parts(tensors, "0.self_attn.k_proj.weight")[0]][:4] = 0


@pytest.mark.parametrize("edit", [zero_head, one_small_row, large_but_held, small_start])
def test_a_model_within_f16_keeps_f16(saved, edit, tmp_path):
    opened = ModelFolder.open(change(saved["llama-relu"], tmp_path / "model", edit))
    assert not opened.spec.wide_kv and opened.spec.kv_element_bytes == 2 and opened.notices == ()
    assert KVCache(opened.spec, 8).data.dtype == np.float16


def test_ordinary_models_keep_f16(saved):
    for folder in (EMBEDDED_MODEL, *saved.values()):
        assert ModelFolder.open(folder).spec.kv_element_bytes == 2


@torch.inference_mode()
@pytest.mark.parametrize(("name", "edit"), [("qwen2", large_bias), ("llama-relu", small_values)])
def test_logits_of_such_a_model(saved, name, edit, tmp_path):
    folder = change(saved[name], tmp_path / "model", edit)
    opened = ModelFolder.open(folder)
    model = opened.build(FFNRuntime("dense", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)
    truth = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, cache = torch.arange(30), KVCache(opened.spec, 30)
    found = model.logits(torch.cat([model(part, cache) for part in tokens.split(10)]))
    expected = truth(tokens[None]).logits[0]
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_vram_plan_counts_those_bytes(saved, tmp_path):
    plain = ModelFolder.open(saved["qwen2"]).spec
    wide = ModelFolder.open(change(saved["qwen2"], tmp_path / "model", large_bias)).spec
    counts = [VramPlan(spec, 40, (0,) * spec.n_layers).kv_bytes for spec in (plain, wide)]
    assert counts[1] == 2 * counts[0]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_packed_copy_knows_it(saved, dtype, tmp_path):
    """Also of an f32 model, whose keys and values were f32 for its type alone."""

    def widen(tensors):
        large_bias(tensors)
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    for edit in (large_bias, widen):
        source = change(saved["qwen2"], tmp_path / edit.__name__, edit)
        pack(source, tmp_path / f"{edit.__name__}-packed", dtype)
        spec = PackedModel.open(tmp_path / f"{edit.__name__}-packed").spec
        assert (spec.dtype, spec.kv_element_bytes) == (dtype, 4)
        assert "kept in f32" in ModelFolder.open(tmp_path / f"{edit.__name__}-packed").notices[0]
    assert ModelFolder.open(tmp_path / "widen").notices == ()


@pytest.mark.parametrize("part", ["k_proj.weight", "v_proj.bias", "input_layernorm.weight"])
def test_nan_among_them_is_named(saved, part, tmp_path):
    def damage(tensors):
        tensors[layer_parts(tensors, f"1.{part}" if "norm" in part else f"1.self_attn.{part}")[0]][2] = float("nan")

    with pytest.raises(ModelError, match=f"{part}' has NaN among its weights"):
        ModelFolder.open(change(saved["qwen2"], tmp_path / "model", damage))
