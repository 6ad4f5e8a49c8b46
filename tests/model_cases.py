"""Small random models of every family, made with transformers and saved as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 85,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT_SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "ffn_dim": 85,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
    "dropout": 0.0,
}
FALCON_SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "ffn_hidden_size": 85,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name: (transformers class prefix, config fields)
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-relu": ("Llama", SHAPE | {"hidden_act": "relu"}),
    "llama-tied-mha-bias": (
        "Llama",
        SHAPE
        | {"hidden_act": "silu", "num_key_value_heads": 6, "tie_word_embeddings": True}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama-mqa-head-dim": ("Llama", SHAPE | {"hidden_act": "relu2", "num_key_value_heads": 1, "head_dim": 10}),
    "llama-rope-linear": (
        "Llama",
        SHAPE | {"hidden_act": "gelu", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-rope-llama3": ("Llama", SHAPE | {"hidden_act": "relu", "rope_parameters": LLAMA3_ROPE}),
    "mistral-window": ("Mistral", SHAPE | {"hidden_act": "relu", "sliding_window": 7}),
    "mistral-full": ("Mistral", SHAPE | {"hidden_act": "silu", "sliding_window": None}),
    "qwen2": ("Qwen2", SHAPE | {"hidden_act": "relu"}),
    "qwen2-window": (
        "Qwen2",
        SHAPE | {"hidden_act": "silu", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SHAPE | {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16}),
    "prosparse": ("Llama", SHAPE | {"hidden_act": "relu"}),
    "bamboo": ("Mistral", SHAPE | {"hidden_act": "relu", "sliding_window": None}),
    "sparse_qwen2": ("Qwen2", SHAPE | {"hidden_act": "relu"}),
    "sparse_llama": ("Llama", SHAPE | {"hidden_act": "relu"}),
    "arcee": ("Arcee", SHAPE),
    "nemotron": ("Nemotron", SHAPE | {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "jais2": ("Jais2", SHAPE),
    "nanochat": ("NanoChat", SHAPE | {"final_logit_softcapping": 0.7}),
    "persimmon": ("Persimmon", SHAPE | {"num_attention_heads": 4, "partial_rotary_factor": 0.5}),
    "falcon": ("Falcon", FALCON_SHAPE | {"activation": "relu", "bias": True}),
    "falcon-grouped": (
        "Falcon",
        FALCON_SHAPE | {"new_decoder_architecture": True, "num_kv_heads": 2, "activation": "relu"},
    ),
    "falcon-one-norm": (
        "Falcon",
        FALCON_SHAPE | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "phi3": ("Phi3", SHAPE | {"pad_token_id": 0, "partial_rotary_factor": 0.5, "sliding_window": 9}),
    "smollm3": ("SmolLM3", SHAPE | {"pad_token_id": 0, "no_rope_layer_interval": 2}),
    "granite": (
        "Granite",
        SHAPE
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.4, "logits_scaling": 2.5},
    ),
    "olmo2": ("Olmo2", SHAPE),
    "gemma3": (
        "Gemma3",
        SHAPE
        | {"head_dim": 10, "query_pre_attn_scalar": 17, "sliding_window": 6, "sliding_window_pattern": 2}
        | {"final_logit_softcapping": 4.0},
    ),
    "llama-yarn": (
        "Llama",
        SHAPE
        | {"hidden_act": "relu"}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_fast": 2.0}}
        | {"original_max_position_embeddings": 16},
    ),
    "opt": ("OPT", OPT_SHAPE | {"activation_function": "relu"}),
    "opt-gelu-untied": ("OPT", OPT_SHAPE | {"activation_function": "gelu", "tie_word_embeddings": False}),
}


# Families whose code comes with the weights: fields that config.json has in the place of transformers' own, and what
# the class of transformers must do otherwise.
FIELDS: dict[str, dict[str, object]] = {
    "prosparse": {"hidden_act": "fatrelu", "hidden_act_param": 0.3},
    "bamboo": {"model_type": "bamboo"},
    "sparse_qwen2": {"model_type": "sparse_qwen2"},
    "sparse_llama": {"model_type": "llama_sparse_relu", "hidden_act": "silu"},
}


def _computes(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """`model` with the FFN of the case `name`."""
    for layer in getattr(getattr(model, "model", None), "layers", []):
        mlp = layer.mlp
        if name == "prosparse":
            mlp.act_fn = torch.nn.Threshold(0.3, 0.0)
        if name in ("bamboo", "sparse_qwen2"):
            mlp.up_proj = torch.nn.Sequential(mlp.up_proj, torch.nn.ReLU())
    return model


def make_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **changes: object
) -> torch.nn.Module:
    """Save the case `name` to `folder` with a byte tokenizer; returns the transformers model in f32.

    changes: fields of the configuration that are to differ.
    """
    import transformers

    prefix, fields = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    config_class = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_class)(**fields | changes)
    kind = getattr(transformers, f"{prefix}ForCausalLM")
    model = kind(config)
    with torch.no_grad():
        for tensor in model.parameters():  # initial biases are 0 and norms 1, which would hide a missing one
            tensor.add_(torch.randn_like(tensor) * 0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    save_byte_tokenizer(folder)
    # Read back, since a cast in place would round the RoPE frequencies too.
    truth = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if name in FIELDS:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | FIELDS[name]))
    return _computes(name, truth)


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of the first printable byte symbols, enough for any short ASCII text in tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=alphabet[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
