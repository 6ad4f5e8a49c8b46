"""Model families as rows of data: tensor names, fixed features, and the fields of config.json that each one reads.

A row says what the family's configuration and model classes in transformers do, default for default; where there is no
such class, what the code that comes with the weights does. A new family is a new row; no other file names one. Parts
that lie in the checkpoint otherwise than here are folded as they are read: `hybrid.formats.folds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hybrid.formats.folds import Rows, first_half, heads_of_groups, heads_of_three, part_of_three, second_half
from profiler.common.spec import QKNorm

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


_NO_GATE = {name: stored for name, stored in _LLAMA_TENSORS.items() if name != "gate"}
_NO_NORMS = {name: stored for name, stored in _NO_GATE.items() if not name.endswith("norm")}
_NORMS_AFTER = {
    "attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
_FALCON_TENSORS = {
    "embedding": "transformer.word_embeddings",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "q": "transformer.h.{}.self_attention.query_key_value",
    "k": "transformer.h.{}.self_attention.query_key_value",
    "v": "transformer.h.{}.self_attention.query_key_value",
    "out": "transformer.h.{}.self_attention.dense",
    "attention_norm": "transformer.h.{}.input_layernorm",
    "ffn_norm": "transformer.h.{}.input_layernorm",
    "up": "transformer.h.{}.mlp.dense_h_to_4h",
    "down": "transformer.h.{}.mlp.dense_4h_to_h",
}
_PERSIMMON_TENSORS = _NO_GATE | {
    "final_norm": "model.final_layernorm",
    "q": "model.layers.{}.self_attn.query_key_value",
    "k": "model.layers.{}.self_attn.query_key_value",
    "v": "model.layers.{}.self_attn.query_key_value",
    "out": "model.layers.{}.self_attn.dense",
    "q_norm": "model.layers.{}.self_attn.q_layernorm",
    "k_norm": "model.layers.{}.self_attn.k_layernorm",
    "up": "model.layers.{}.mlp.dense_h_to_4h",
    "down": "model.layers.{}.mlp.dense_4h_to_h",
}
_PHI3_TENSORS = _LLAMA_TENSORS | {
    "q": "model.layers.{}.self_attn.qkv_proj",
    "k": "model.layers.{}.self_attn.qkv_proj",
    "v": "model.layers.{}.self_attn.qkv_proj",
    "gate": "model.layers.{}.mlp.gate_up_proj",
    "up": "model.layers.{}.mlp.gate_up_proj",
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
    the family does not read that field, all layers have one. every: default of `sliding_window_pattern`, all layers
    have one but every so-manyth. `layer_types` goes before these, where it is given.
    """

    size: int | None
    switch: Switch | None = None
    first_layer: int | None = None
    every: int | None = None


@dataclass(frozen=True)
class Family:
    """One `model_type`. What a row leaves out is as for Llama; defaults are for fields that config.json leaves out.

    fields: config.json's own names for what Llama calls otherwise; None for what this family does not read.
    defaults: of fields that others must have. rows: which rows of its stored tensor a part is, where it is not all.
    ffn_multiple: the default of `intermediate_size` is so many times the width. activation: what is computed whatever
    `hidden_act` says; of_relu: what `relu` means there. norm_plus: added to the weights of norms. kv_heads: default of
    `num_key_value_heads`; None: as many as heads. rope_theta: None for learned positions; local_rope_theta: of layers
    with a window, where they have one of their own. partial: default of `partial_rotary_factor`; None: not read.
    sine_turned: the sign of RoPE's sine is the other. no_rope_every: default of `no_rope_layer_interval`, every
    so-manyth layer has no RoPE. scaled_embedding: times the root of its width. multipliers: the four of Granite are
    read. score_width: default of `query_pre_attn_scalar`. capped: whether `final_logit_softcapping` is read, with its
    default. variants: rows to take in this one's place, by a field's value. ignored: fields that say nothing here.
    only: fields whose one supported value is known.
    """

    tensors: Mapping[str, str] = field(default_factory=lambda: _LLAMA_TENSORS)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    fields: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ffn_multiple: int | None = None
    gated: bool = True
    activation: str | None = None
    of_relu: str = "relu"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_plus: float = 0.0
    norms: Literal["before", "after", "both"] = "before"
    parallel: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    local_rope_theta: float | None = None
    partial: float | None = None
    sine_turned: bool = False
    no_rope_every: int | None = None
    qk_norm: QKNorm | None = None
    qkv_bias: Switch | bool = Switch("attention_bias", False)
    out_bias: Switch | bool = Switch("attention_bias", False)
    ffn_bias: Switch | bool = Switch("mlp_bias", False)
    embedding_norm: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False
    score_width: float | None = None
    capped: tuple[float | None] | None = None
    tied: bool = False
    window: Window | None = None
    variants: tuple[tuple[str, Any, str], ...] = ()
    ignored: tuple[str, ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)


_QWEN_WINDOW = Window(4096, Switch("use_sliding_window", False), first_layer=28)
_OPT_BIAS = Switch("enable_bias", True)
_RELU2 = {"hidden_act": "relu2"}
_LAYER_EPS = {"rms_norm_eps": "layer_norm_eps"}
_FALCON_BIAS = Switch("bias", False)
_FALCON = Family(
    tensors=_FALCON_TENSORS,
    rows={part: heads_of_groups(part) for part in ("q", "k", "v")},
    fields={
        "intermediate_size": "ffn_hidden_size",
        "hidden_act": "activation",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    defaults={"hidden_act": "gelu", "max_position_embeddings": 2048},
    ffn_multiple=4,
    gated=False,
    norm="layer",
    norm_eps=1e-5,
    parallel=True,
    kv_heads=1,
    qkv_bias=_FALCON_BIAS,
    out_bias=_FALCON_BIAS,
    ffn_bias=_FALCON_BIAS,
    tied=True,
    ignored=("num_kv_heads", "num_ln_in_parallel_attn"),
    only={"alibi": False, "new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
)
_FALCON_GROUPED = replace(
    _FALCON,
    tensors=_FALCON_TENSORS | {"attention_norm": "transformer.h.{}.ln_attn", "ffn_norm": "transformer.h.{}.ln_mlp"},
    fields={**_FALCON.fields, "num_key_value_heads": "num_kv_heads"},
    kv_heads=None,
    variants=(("num_ln_in_parallel_attn", 1, "falcon grouped, one norm"),),
    ignored=("multi_query", "num_ln_in_parallel_attn"),
    only={"alibi": False, "new_decoder_architecture": True, "parallel_attn": True},
)

FAMILIES: dict[str, Family] = {
    "llama": Family(only={"pretraining_tp": 1}),
    # With `layer_types` it is transformers' Ministral, without it Mistral; both have these rules.
    "mistral": Family(kv_heads=8, qkv_bias=False, out_bias=False, ffn_bias=False, window=Window(4096)),
    "qwen2": Family(kv_heads=32, qkv_bias=True, out_bias=False, ffn_bias=False, window=_QWEN_WINDOW),
    "qwen3": Family(kv_heads=32, head_dim=128, qk_norm="head", ffn_bias=False, window=_QWEN_WINDOW),
    # A ReLU of up beside that of gate. Their code comes with the weights; so does that of the next one.
    "bamboo": Family(kv_heads=8, qkv_bias=False, out_bias=False, ffn_bias=False, of_relu="drelu", window=Window(4096)),
    "sparse_qwen2": Family(
        kv_heads=32, qkv_bias=True, out_bias=False, ffn_bias=False, of_relu="drelu", window=_QWEN_WINDOW
    ),
    # Its config.json says silu, which its code does not read.
    "llama_sparse_relu": Family(activation="relu", only={"pretraining_tp": 1}),
    "arcee": Family(tensors=_NO_GATE, gated=False, norm_eps=1e-5, defaults=_RELU2),
    "nemotron": Family(
        tensors=_NO_GATE,
        fields={"rms_norm_eps": "norm_eps"},
        defaults=_RELU2,
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        norm_plus=1.0,
        partial=0.5,
        ignored=("rope_percent",),
    ),
    "jais2": Family(
        tensors=_NO_GATE,
        fields=_LAYER_EPS,
        defaults=_RELU2,
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        qkv_bias=Switch("attention_bias", True),
        out_bias=Switch("attention_bias", True),
        ffn_bias=Switch("mlp_bias", True),
    ),
    "nanochat": Family(
        tensors=_NO_NORMS | {"up": "model.layers.{}.mlp.fc1", "down": "model.layers.{}.mlp.fc2"},
        defaults=_RELU2,
        gated=False,
        sine_turned=True,
        qk_norm="head",
        out_bias=False,
        ffn_bias=False,
        embedding_norm=True,
        capped=(15.0,),
    ),
    "persimmon": Family(
        tensors=_PERSIMMON_TENSORS,
        rows={part: heads_of_three(part) for part in ("q", "k", "v")},
        fields=_LAYER_EPS | {"num_key_value_heads": None, "head_dim": None},
        defaults=_RELU2,
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        partial=0.5,
        qk_norm="head layer",
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        only={"qk_layernorm": True},
    ),
    "falcon": replace(_FALCON, variants=(("new_decoder_architecture", True, "falcon grouped"),)),
    "falcon grouped": _FALCON_GROUPED,
    "falcon grouped, one norm": replace(_FALCON_GROUPED, tensors=_FALCON_TENSORS, variants=()),
    "phi3": Family(
        tensors=_PHI3_TENSORS,
        rows={part: part_of_three(part) for part in ("q", "k", "v")} | {"gate": first_half, "up": second_half},
        defaults={"hidden_act": "silu", "original_max_position_embeddings": 4096},
        norm_eps=1e-5,
        partial=1.0,
        qkv_bias=False,
        out_bias=False,
        ffn_bias=False,
        window=Window(None),
    ),
    "smollm3": Family(
        kv_heads=4,
        rope_theta=2000000.0,
        no_rope_every=4,
        tied=True,
        window=Window(None, Switch("use_sliding_window", False)),
        ignored=("pretraining_tp",),
    ),
    "granite": Family(multipliers=True),
    "olmo2": Family(
        tensors={name: stored for name, stored in _LLAMA_TENSORS.items() if name not in ("attention_norm", "ffn_norm")}
        | _NORMS_AFTER,
        norm_eps=1e-5,
        norms="after",
        qk_norm="all",
        ffn_bias=False,
    ),
    "gemma3_text": Family(
        tensors=_LLAMA_TENSORS | _NORMS_AFTER | {"ffn_norm": "model.layers.{}.pre_feedforward_layernorm"},
        fields={"hidden_act": "hidden_activation"},
        defaults={"hidden_act": "gelu_pytorch_tanh"},
        norm_plus=1.0,
        norms="both",
        kv_heads=4,
        head_dim=256,
        rope_theta=1000000.0,
        local_rope_theta=10000.0,
        qk_norm="head",
        ffn_bias=False,
        scaled_embedding=True,
        score_width=256.0,
        capped=(None,),
        tied=True,
        window=Window(4096, every=6),
        ignored=("_sliding_window_pattern",),
        only={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
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
