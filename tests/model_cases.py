"""Small random models of every family, made with transformers and saved as Hugging Face folders."""

from __future__ import annotations

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
    "opt": ("OPT", OPT_SHAPE | {"activation_function": "relu"}),
    "opt-gelu-untied": ("OPT", OPT_SHAPE | {"activation_function": "gelu", "tie_word_embeddings": False}),
}


def make_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **changes: object
) -> torch.nn.Module:
    """Save the case `name` to `folder` with a byte tokenizer; returns the transformers model in f32.

    changes: fields of the configuration that are to differ.
    """
    import transformers

    prefix, fields = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{prefix}Config")(**fields | changes)
    kind = getattr(transformers, f"{prefix}ForCausalLM")
    model = kind(config)
    with torch.no_grad():
        for tensor in model.parameters():  # initial biases are 0 and norms 1, which would hide a missing one
            tensor.add_(torch.randn_like(tensor) * 0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    save_byte_tokenizer(folder)
    # Read back, since a cast in place would round the RoPE frequencies too.
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of the first printable byte symbols, enough for any short ASCII text in tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=alphabet[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
