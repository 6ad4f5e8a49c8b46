"""RoPE against transformers: kinds, parts of heads, and texts that grow beyond what the model was first trained for."""

import pytest
import torch
from model_cases import CASES, SHAPE, make_model

from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.loader import ModelFolder
from hybrid.model.rope import rope_frequencies, step_rotation
from hybrid.runtime.cpu_step import CpuStep
from profiler.common.spec import RopeSpec

transformers = pytest.importorskip("transformers")
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.5], "long_factor": [3.0, 9.0]}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0}
KINDS = {
    "dynamic": ("Llama", SHAPE | {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "longrope": (
        "Phi3",
        SHAPE
        | {"pad_token_id": 0, "rope_parameters": LONG | {"partial_rotary_factor": 0.5}}
        | {"original_max_position_embeddings": 16},
    ),
    "yarn": ("Qwen3", SHAPE | {"rope_parameters": YARN | {"attention_factor": 0.7}, "max_position_embeddings": 16}),
    "yarn-scales": (
        "Llama",
        SHAPE | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}},
    ),
}


@pytest.fixture(params=KINDS)
def made(request, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, request.param, KINDS[request.param])
    truth = make_model(request.param, tmp_path)
    opened = ModelFolder.open(tmp_path)
    return truth, opened.build(FFNRuntime("dense", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)


def tokens(count):
    return torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
@pytest.mark.parametrize("length", [9, 16, 17, 40])
def test_a_prompt_of_any_length(made, length):
    truth, model = made
    text = tokens(length)
    expected = truth(text[None], use_cache=False).logits[0]
    assert float((model.logits(model(text)) - expected).abs().max() / expected.abs().max()) < 1e-4
    cache, first = KVCache(model.spec, 40), length // 2  # in pieces, of which the first knows how long all is
    hidden = [model(text[:first], cache, length), model(text[first:], cache, length)]
    assert float((model.logits(torch.cat(hidden)) - expected).abs().max() / expected.abs().max()) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [5, 14, 20])
def test_an_answer_that_grows(made, prompt):
    """Keys that were cached while the text was shorter stay as they are, as in transformers."""
    truth, model = made
    text, cache = tokens(30), KVCache(model.spec, 30)
    model(text[:prompt], cache)
    step, past = CpuStep(model, cache, model.ffns[0].runtime), truth(text[None, :prompt], use_cache=True)
    for at in range(prompt, 30):
        past = truth(text[None, at : at + 1], past_key_values=past.past_key_values, use_cache=True)
        expected, found = past.logits[0, -1], step.run(int(text[at]), "dense")
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4, at


def test_what_passes_turns_by_nothing():
    rope = RopeSpec(100.0, turned=4, scale=2.0, score_scale=9.0)
    assert rope_frequencies(rope, 8).tolist() == pytest.approx([1.0, 0.1, 0.0, 0.0])
    cos, sin = step_rotation(rope, 8, 3)
    assert cos[0].tolist() == pytest.approx([6.0, 6.0, 3.0, 3.0]) and sin[0].tolist() == [0.0] * 4
    assert sin[2, 2:].tolist() == [0.0, 0.0] and sin[2, 0] == pytest.approx(6 * torch.tensor(2.0).sin())
    cos, sin = step_rotation(RopeSpec(kind="none", score_scale=4.0), 8, 2)
    assert (cos == 2).all() and (sin == 0).all()
