"""llama.cpp's architectures: files with the names, the order of rows and the norms that its converter gives them.

The whole converter was run once on the same models; its files gave the folders' logits to the last bit.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_cases import unpacked
from model_cases import make_model
from packed_cases import pack

from cpu_kernels.blocks import dequantize
from hybrid.formats.gguf_architectures import ARCHITECTURES
from hybrid.formats.packed import PackedModel, parts
from hybrid.model.gguf_run import open_run_form
from hybrid.model.loader import ModelFolder

gguf = pytest.importorskip("gguf")
WIDE = {"hidden_size": 96, "intermediate_size": 160}
FALCON = {"hidden_size": 96, "ffn_hidden_size": 384, "activation": "gelu", "max_position_embeddings": 2048}
# case: architecture, changes to the model, what is done to it: heads paired, queries, keys, values joined, norms + 1.
CASES = {
    "mistral-full": ("llama", {}, "paired"),
    "qwen2": ("qwen2", {"hidden_act": "silu"}, ""),
    "qwen3": ("qwen3", {"hidden_act": "silu"}, ""),
    "arcee": ("arcee", {}, "paired"),
    "granite": ("granite", {}, "paired"),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}, "paired"),
    "nemotron": ("nemotron", {"head_dim": 16}, "plus"),
    "jais2": ("jais2", {}, ""),
    "olmo2": ("olmo2", {}, ""),
    "phi3": ("phi3", {"original_max_position_embeddings": 64}, ""),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 10, "sliding_window_pattern": 6, "num_hidden_layers": 7}, "plus"),
    "falcon": ("falcon", FALCON | {"bias": False}, "joined"),
    "falcon-grouped": ("falcon", FALCON, "joined"),
}
# Keys, less the architecture, by the spec's fields or what of the config they are.
KEYS = {
    "context_length": lambda spec, config: spec.max_context,
    "embedding_length": lambda spec, config: spec.d_model,
    "block_count": lambda spec, config: spec.n_layers,
    "feed_forward_length": lambda spec, config: spec.d_ff,
    "attention.head_count": lambda spec, config: spec.n_heads,
    "attention.head_count_kv": lambda spec, config: spec.n_kv_heads,
    "attention.key_length": lambda spec, config: spec.head_dim,
    "attention.value_length": lambda spec, config: spec.head_dim,
    "attention.sliding_window": lambda spec, config: spec.sliding_window,
    "attention.scale": lambda spec, config: config.get("attention_multiplier"),
    "embedding_scale": lambda spec, config: config.get("embedding_multiplier"),
    "residual_scale": lambda spec, config: config.get("residual_multiplier"),
    "logit_scale": lambda spec, config: config.get("logits_scaling"),
    "final_logit_softcapping": lambda spec, config: config.get("final_logit_softcapping"),
    "rope.freq_base": lambda spec, config: spec.rope.theta,
    "rope.dimension_count": lambda spec, config: spec.rope.turned or spec.head_dim,
}


def moved(values, name, spec, done):
    """A tensor as llama.cpp's converter would write it."""
    if "paired" in done and ("q_proj" in name or "k_proj" in name):
        heads = spec.n_heads if "q_proj" in name else spec.n_kv_heads
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if "joined" in done and "query_key_value" in name:
        grouped = values.reshape(spec.n_kv_heads, -1, spec.head_dim, values.shape[1])
        each = [grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]]
        return np.concatenate([rows.reshape(-1, values.shape[1]) for rows in each])
    return values + np.float32(1) if "plus" in done and name.endswith("norm.weight") else values


def convert(case, tmp_path, kind="F32"):
    arch, changes, done = CASES[case]
    make_model(case, tmp_path / "model", **(changes if "falcon" in case else WIDE | changes))
    folder = ModelFolder.open(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    eps = "layer_norm" if folder.spec.norm == "layer" else "layer_norm_rms"
    values = {key: read(folder.spec, config) for key, read in KEYS.items()}
    for key, value in (values | {f"attention.{eps}_epsilon": config.get("rms_norm_eps", folder.spec.norm_eps)}).items():
        if value is not None:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(folder.spec.vocab_size)])
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], folder.spec.n_layers)
    for name, info in folder.checkpoint.infos.items():
        if name == "lm_head.weight" and folder.spec.tied:
            continue
        array = moved(folder.checkpoint.tensor(name, info.shape).numpy(), name, folder.spec, done)
        dtype = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(array), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_is_the_folder(tmp_path, case):
    file = ModelFolder.open(convert(case, tmp_path))
    folder, same = (
        ModelFolder.open(tmp_path / "model"),
        ("family", "norm_eps", "fingerprint", "embedding_scale", "rope"),
    )
    assert replace(file.spec, **{name: getattr(folder.spec, name) for name in same}) == folder.spec
    assert file.spec.norm_eps == pytest.approx(folder.spec.norm_eps, rel=1e-6)
    assert file.spec.rope.score_scale == pytest.approx(folder.spec.rope.score_scale, rel=1e-6)
    assert file.spec.embedding_scale == pytest.approx(folder.spec.embedding_scale, rel=1e-6)
    for name, info in file.checkpoint.infos.items():
        expected = folder.checkpoint.tensor(name, info.shape)
        torch.testing.assert_close(file.checkpoint.tensor(name, info.shape), expected, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("case", ["phi3", "falcon-grouped", "nemotron"])
def test_codes_of_joined_and_moved_rows_are_taken(tmp_path, case):
    path = convert(case, tmp_path, "Q8_0")
    folder = ModelFolder.open(path)
    run = open_run_form(folder.spec, folder.checkpoint, None, tmp_path / "run")
    pack(unpacked(path, tmp_path / "numbers"), tmp_path / "packed", "int8")
    packed = PackedModel.open(tmp_path / "packed")
    for part in parts(run.spec):
        found, expected = (each.stored(part.name) for each in (run, packed))
        if part.dtype == "int8":
            found, expected = (dequantize(each, part.shape[1]) for each in (found, expected))
        np.testing.assert_array_equal(found, expected, err_msg=part.name)


def test_each_architecture_is_tested():
    assert {name for name in ARCHITECTURES if " " not in name} == {arch for arch, *_ in CASES.values()}
