"""Our transformer against Hugging Face transformers: every family, shape and stored type, prefill and decode."""

from dataclasses import replace

import pytest
import torch
from model_cases import CASES, make_model

from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.loader import ModelFolder

pytest.importorskip("transformers")
TOLERANCE = 1e-4


def build(folder, strategy="dense"):
    opened = ModelFolder.open(folder)
    return opened.build(FFNRuntime(strategy, WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)


def relative_error(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_prefill_logits_match_transformers(name, tmp_path):
    truth = make_model(name, tmp_path)
    model = build(tmp_path)
    for length in (1, 2, 29, 64):
        tokens = torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(length))
        ours = model.logits(model(tokens))
        assert relative_error(ours, truth(tokens[None]).logits[0]) < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("strategy", ["dense", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_decode_after_chunked_prefill_matches_transformers(name, strategy, tmp_path):
    truth = make_model(name, tmp_path)
    model = build(tmp_path, strategy)
    tokens = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.spec, 40)
    parts = [model(part, cache) for part in (tokens[:9], tokens[9:20])]
    model.ffns[0].runtime.as_decode = True
    parts += [model(token, cache) for token in tokens[20:].split(1)]
    assert relative_error(model.logits(torch.cat(parts)), truth(tokens[None]).logits[0]) < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-relu", "qwen3", "opt"])
def test_half_precision_weights_compute_in_f32(name, dtype, tmp_path):
    truth = make_model(name, tmp_path, dtype)
    model = build(tmp_path)
    assert model.spec.dtype == {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    tokens = torch.randint(0, 131, (30,), generator=torch.Generator().manual_seed(2))
    for kept, tolerance in (("f32", TOLERANCE), (model.spec.dtype, 1e-3)):  # keys and values: f16 beside such weights
        cache = KVCache(replace(model.spec, dtype=kept), 30)
        ours = torch.cat([model(tokens[:29], cache), model(tokens[29:], cache)])
        assert relative_error(model.logits(ours), truth(tokens[None]).logits[0]) < tolerance


@torch.inference_mode()
@pytest.mark.parametrize("name", ["bamboo", "prosparse", "arcee"])
def test_what_fires_is_what_the_activation_says(name, tmp_path):
    """As a profiler sees it: a neuron fires where what it adds is not 0."""
    truth, tokens, seen = make_model(name, tmp_path), torch.arange(30), []
    model = build(tmp_path)
    for ffn in model.ffns:
        ffn.runtime.keep_fired = True
        ffn.act.register_forward_hook(lambda module, args, out: seen.append(out))
    for layer in truth.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0] != 0))
    model(tokens)
    truth(tokens[None])
    ours, theirs = torch.stack(seen[:3]), torch.stack(seen[3:])
    assert 0.1 < ours.float().mean() < 0.6 and (ours != theirs).float().mean() < 1e-3


@torch.inference_mode()
def test_sharded_checkpoint_equals_single_file(tmp_path):
    truth = make_model("llama-relu", tmp_path / "shards", shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    tokens = torch.arange(20)
    model = build(tmp_path / "shards")
    assert relative_error(model.logits(model(tokens)), truth(tokens[None]).logits[0]) < TOLERANCE


def test_fingerprint_follows_weights_and_configuration(tmp_path):
    make_model("llama-relu", tmp_path / "a")
    make_model("llama-relu", tmp_path / "b")
    same = ModelFolder.open(tmp_path / "a").spec.fingerprint
    assert ModelFolder.open(tmp_path / "b").spec.fingerprint == same
    weights = tmp_path / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert ModelFolder.open(tmp_path / "b").spec.fingerprint != same
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert ModelFolder.open(tmp_path / "a").spec.fingerprint != same
