"""Model families as rows of data: tensor names, fixed features, and the fields of config.json that each one reads.

A row says what the family's configuration and model classes in transformers do, default for default. A new family is
a new row; no other file names one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_LLAMA_TENSORS = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "out": "model.layers.{}.self_attn.o_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "attention_norm": "model.layers.{}.input_layernorm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}
_OPT_TENSORS = {
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "q": "model.decoder.layers.{}.self_attn.q_proj",
    "k": "model.decoder.layers.{}.self_attn.k_proj",
    "v": "model.decoder.layers.{}.self_attn.v_proj",
    "out": "model.decoder.layers.{}.self_attn.out_proj",
    "attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "ffn_norm": "model.decoder.layers.{}.final_layer_norm",
    "up": "model.decoder.layers.{}.fc1",
    "down": "model.decoder.layers.{}.fc2",
}


@dataclass(frozen=True)
class Switch:
    """A feature that a field of config.json turns on or off; `default` is for a file without that field."""

    field: str
    default: bool


@dataclass(frozen=True)
class Window:
    """Sliding attention. size: tokens that a layer sees where `sliding_window` is missing; null there means all.

    switch: what has to be on for any window. first_layer: where windows begin if `max_window_layers` is missing; None:
    the family does not read that field, all layers have one. `layer_types` goes before it, where it is given.
    """

    size: int | None
    switch: Switch | None = None
    first_layer: int | None = None


@dataclass(frozen=True)
class Family:
    """One `model_type`. What a row leaves out is as for Llama; defaults are for fields that config.json leaves out.

    fields: config.json's own names for what Llama calls otherwise; None for what this family does not read.
    kv_heads: default of `num_key_value_heads`; None: as many as heads. rope_theta: None for learned positions.
    only: fields whose one supported value is known.
    """

    tensors: Mapping[str, str] = field(default_factory=lambda: _LLAMA_TENSORS)
    fields: Mapping[str, str | None] = field(default_factory=dict)
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    qk_norm: bool = False
    qkv_bias: Switch | bool = Switch("attention_bias", False)
    out_bias: Switch | bool = Switch("attention_bias", False)
    ffn_bias: Switch | bool = Switch("mlp_bias", False)
    tied: bool = False
    window: Window | None = None
    only: Mapping[str, Any] = field(default_factory=dict)


_QWEN_WINDOW = Window(4096, Switch("use_sliding_window", False), first_layer=28)
_OPT_BIAS = Switch("enable_bias", True)

FAMILIES: dict[str, Family] = {
    "llama": Family(only={"pretraining_tp": 1}),
    # With `layer_types` it is transformers' Ministral, without it Mistral; both have these rules.
    "mistral": Family(kv_heads=8, qkv_bias=False, out_bias=False, ffn_bias=False, window=Window(4096)),
    "qwen2": Family(kv_heads=32, qkv_bias=True, out_bias=False, ffn_bias=False, window=_QWEN_WINDOW),
    "qwen3": Family(kv_heads=32, head_dim=128, qk_norm=True, ffn_bias=False, window=_QWEN_WINDOW),
    "opt": Family(
        tensors=_OPT_TENSORS,
        fields={
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
            "rms_norm_eps": None,
            "num_key_value_heads": None,
            "head_dim": None,
        },
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        rope_theta=None,
        qkv_bias=_OPT_BIAS,
        out_bias=_OPT_BIAS,
        ffn_bias=_OPT_BIAS,
        tied=True,
        only={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    ),
}
