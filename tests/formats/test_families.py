"""Each family's row against transformers: what it makes of a config.json that says little, and of one that says all."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch

from cpu_kernels.worker_pool import WorkerPool
from hybrid.formats import families
from hybrid.formats.config import parse_config
from hybrid.formats.families import FAMILIES, Family
from hybrid.model.ffn import FFNRuntime
from hybrid.model.loader import ModelFolder

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

# Without these no model can be built; a family's row knows the rest.
NEEDED = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
NEEDED |= {"max_position_embeddings", "intermediate_size", "ffn_dim", "hidden_act", "activation_function"}
NEEDED |= {"ffn_hidden_size", "activation", "hidden_activation", "pad_token_id"}
# Families whose code comes with the weights are otherwise as these; `model_cases` has them as well.
LIKE = {"bamboo": "mistral", "sparse_qwen2": "qwen2", "llama_sparse_relu": "llama"}
TYPES = [name for name in FAMILIES if " " not in name]  # the others are variants
TINY = {"vocab_size": 37, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
TINY |= {"max_position_embeddings": 64, "pad_token_id": 0}
PAST_EVERY_DEFAULT = 4200  # 4096 is the largest of those that count
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LIMITS = [
    *((name, {}) for name in TYPES if name not in LIKE),
    ("phi3", {"sliding_window": 60, "partial_rotary_factor": 0.5}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1}),
    ("llama", {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 16}, "rope_theta": 500.0}),
    ("llama", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 60, "head_dim": 8}),
    ("mistral", {"layer_types": None, "sliding_window": 60, "head_dim": 8}),
    ("mistral", {"use_sliding_window": False, "sliding_window": 60, "max_window_layers": 1, "attention_bias": True}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 60}),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    ("qwen2", {"sliding_window": 60, "attention_bias": True}),
    ("opt", {"rope_theta": 5.0, "head_dim": 4, "num_key_value_heads": 8}),
]


def save_tiny(name, folder, **changes):
    """A random model of the family `name` whose config.json has what it needs and `changes`; inputs as small as eps."""
    torch.manual_seed(0)
    width = FAMILIES[name].fields.get("intermediate_size", "intermediate_size")
    config = transformers.AutoConfig.for_model(name, **TINY | {width: 12, "max_position_embeddings": 4200})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.get_input_embeddings().weight.mul_(0.01)
    model.save_pretrained(folder)
    path = folder / "config.json"
    says = {key: value for key, value in json.loads(path.read_text()).items() if key in NEEDED}
    if FAMILIES[name].rope_theta is not None:  # or positions are a table
        says["max_position_embeddings"] = 64
    path.write_text(json.dumps(says | changes))


@torch.inference_mode()
@pytest.mark.parametrize(("name", "says"), LIMITS, ids=[f"{name}-{'-'.join(says) or 'bare'}" for name, says in LIMITS])
def test_logits_beyond_every_limit_of_the_config(name, says, tmp_path):
    save_tiny(name, tmp_path, **says)
    opened = ModelFolder.open(tmp_path)
    model = opened.build(FFNRuntime("dense", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)
    truth = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    count = 300 if says else PAST_EVERY_DEFAULT
    tokens = torch.randint(0, 37, (count,), generator=torch.Generator().manual_seed(1))
    ours = model.logits(model(tokens)[-100:])
    theirs = truth(tokens[None], use_cache=False, logits_to_keep=100).logits[0]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, {}) for name in TYPES),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3}),
    ],
)
def test_what_config_json_leaves_out_is_as_in_transformers(name, says):
    fields = {"num_hidden_layers": 30, "num_attention_heads": 32, "hidden_size": 256, "vocab_size": 99}
    theirs = transformers.AutoConfig.for_model(LIKE.get(name, name), **fields | says | {"pad_token_id": 0})
    given = theirs.to_dict() | {"model_type": name}
    spec = parse_config({key: given[key] for key in NEEDED & given.keys() - {"num_key_value_heads"}} | says)
    one_head = getattr(theirs, "multi_query", False)
    assert spec.n_kv_heads == (1 if one_head else getattr(theirs, "num_key_value_heads", None) or 32)
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert spec.norm_eps == getattr(theirs, "rms_norm_eps", 1e-5)
    assert spec.d_ff == getattr(theirs, FAMILIES[name].fields.get("intermediate_size", "intermediate_size"))
    assert spec.tied == theirs.tie_word_embeddings
    rope = getattr(theirs, "rope_parameters", None)
    assert (spec.rope and spec.rope.theta) == (rope and rope.get("full_attention", rope)["rope_theta"])
    share = rope.get("partial_rotary_factor", 1) if rope else 1
    assert (spec.rope and spec.rope.turned) == (None if share == 1 else int(share * spec.head_dim))
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 30
    expected = [window if kind == "sliding_attention" else None for kind in types]
    assert [
        spec.sliding_window if spec.sliding_layers and spec.sliding_layers[n] else None for n in range(30)
    ] == expected


def test_a_new_row_inherits_no_other_familys_window_or_eps(monkeypatch):
    monkeypatch.setitem(FAMILIES, "new", Family(gated=False, norm_eps=1e-4))
    spec = parse_config(TINY | {"model_type": "new", "hidden_act": "relu2", "intermediate_size": 12})
    assert (spec.sliding_window, spec.sliding_layers, spec.norm_eps, spec.gated) == (None, (), 1e-4, False)


def test_no_other_file_names_a_family():
    room = Path(families.__file__).parents[1]
    naming = set()
    for path in room.rglob("*.py"):
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        if any(isinstance(value, str) and value in FAMILIES for value in constants):
            naming.add(path.relative_to(room).as_posix())
    # The others name what llama.cpp and PowerInfer call so.
    foreign = {"formats/gguf_architectures.py", "formats/gguf_tokenizer.py", "formats/powerinfer_tokens.py"}
    assert naming == {"formats/families.py", "offline/powerinfer_model.py", *foreign}
