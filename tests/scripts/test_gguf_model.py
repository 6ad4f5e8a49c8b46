"""The GGUF writer: llama.cpp computes from its files what transformers computes from the folder."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import CASES, LLAMA3_ROPE, SHAPE, make_model, save_byte_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import gguf_model

from hybrid.errors import InputError
from hybrid.model.loader import ModelFolder

WIDE = SHAPE | {"hidden_act": "silu", "hidden_size": 96, "intermediate_size": 160, "num_key_value_heads": 2}
MODELS = {
    "grouped": ("Llama", WIDE),
    "head-dim": ("Llama", WIDE | {"head_dim": 32, "num_key_value_heads": 6}),
    "tied": ("Llama", WIDE | {"tie_word_embeddings": True}),
    "linear": ("Llama", WIDE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": ("Llama", WIDE | {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", WIDE | {"sliding_window": None}),
}
TOKENS = [5, 99, 7, 130, 0, 64, 31, 2]


@pytest.fixture
def case(monkeypatch):
    def add(name):
        monkeypatch.setitem(CASES, name, MODELS[name])
        return name

    return add


def llama_cpp_logits(path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=32, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    model.eval(TOKENS)
    logits = model.scores[: len(TOKENS)].copy()
    model.close()
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(tmp_path, case, name):
    pytest.importorskip("gguf")
    model = make_model(case(name), tmp_path / "model")
    gguf_model.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(llama_cpp_logits(tmp_path / "m.gguf"), expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "correlation"), [("f16", 0.99999), ("q4_0", 0.8)])
def test_smaller_types_are_near_f32(tmp_path, case, kind, correlation):
    pytest.importorskip("llama_cpp")  # which writes q4_0, and computes
    make_model(case("grouped"), tmp_path / "model")
    for each in ("f32", kind):
        gguf_model.write_gguf(tmp_path / "model", tmp_path / f"{each}.gguf", each)
    exact, rounded = (llama_cpp_logits(tmp_path / f"{each}.gguf") for each in ("f32", kind))
    assert correlation < np.corrcoef(rounded.ravel(), exact.ravel())[0, 1] < 1
    assert (tmp_path / f"{kind}.gguf").stat().st_size < (tmp_path / "f32.gguf").stat().st_size
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_that_are_turned_together_become_neighbours(tmp_path, case):
    make_model(case("grouped"), tmp_path / "model")
    folder = ModelFolder.open(tmp_path / "model")
    part = gguf_model.Part("attn_k", "self_attn.k_proj", (32, 96), 2).of_layer(1)
    stored = folder.checkpoint.tensor("model.layers.1.self_attn.k_proj.weight", (32, 96)).numpy()
    written = gguf_model.tensor_values(folder, part, np.dtype(np.float32))
    np.testing.assert_array_equal(written[[0, 1, 2, 15, 16, 17]], stored[[0, 8, 1, 15, 16, 24]])


@pytest.mark.parametrize("name", ["qwen2", "opt", "llama-tied-mha-bias", "mistral-window"])
def test_models_that_would_lose_a_part_are_refused(tmp_path, name):
    make_model(name, tmp_path / "model")
    with pytest.raises(InputError, match="without biases"):
        gguf_model.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


def test_values_beyond_f16_are_refused_and_leave_the_old_file(tmp_path, case):
    pytest.importorskip("gguf")
    model = make_model(case("grouped"), tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    shutil.rmtree(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight.*write f32"):
        gguf_model.write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
    assert (tmp_path / "m.gguf").read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("module", "kind"), [("gguf", "f16"), ("llama_cpp", "q4_0")])
def test_missing_packages_are_named(tmp_path, case, monkeypatch, module, kind):
    make_model(case("grouped"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"hybrid-inference\[peers\]"):
        gguf_model.write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind)
