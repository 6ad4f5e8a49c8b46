"""`config.json` of a Hugging Face model folder to a `ModelSpec`.

Families are rows of data: field names, defaults and tensor names. A field that is not known here and is not
neutral is refused by name, because running on with other arithmetic would give wrong answers silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import ModelError
from profiler.spec import Activation, ModelSpec, RopeSpec

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

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
class Family:
    """How one `model_type` differs from a Llama: names, fixed features, and fields whose only known value is fixed."""

    tensors: Mapping[str, str] = field(default_factory=lambda: _LLAMA_TENSORS)
    d_ff: str = "intermediate_size"
    activation: str = "hidden_act"
    gated: bool = True
    norm: str = "rms"
    rope: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    tied_default: bool = False
    sliding_default: int | None = None
    only: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(only={"pretraining_tp": 1}),
    "mistral": Family(sliding_default=4096),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "opt": Family(
        tensors=_OPT_TENSORS,
        d_ff="ffn_dim",
        activation="activation_function",
        gated=False,
        norm="layer",
        rope=False,
        tied_default=True,
        only={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    ),
}

# Read below, each by its own line.
_READ = {
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_bias", "mlp_bias", "enable_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "word_embed_proj_dim",
}  # fmt: skip
# Known to leave the arithmetic of inference alone: bookkeeping, training-only settings, token ids, output options.
_HARMLESS = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "use_cache",
    "initializer_range", "init_std", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "dropout", "attention_dropout", "activation_dropout", "layerdrop", "prefix",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "is_decoder", "tokenizer_class", "task_specific_params", "finetuning_task", "license",
    "auto_map", "unsloth_version", "unsloth_fixed", "language",
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelError` when `path` is missing, is not JSON, or holds something else."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; a Hugging Face model folder has one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object; fetch the model again")
    return value


def parse_config(config: Mapping[str, Any], where: str = "config.json", fingerprint: str = "") -> ModelSpec:
    """Build the `ModelSpec` that `config` describes; its dtype is set later, from the weights themselves.

    Raises `ModelError` for an unknown architecture or activation, a missing or absurd field, or a field that
    would change the arithmetic in a way not known here.
    """
    family = _family(config, where)
    _refuse_unknown(config, family, where)
    heads, d_model = _size(config, "num_attention_heads", where), _size(config, "hidden_size", where)
    layers = _size(config, "num_hidden_layers", where)
    window, sliding = _sliding(config, family, layers)
    bias = bool(config.get("attention_bias", False))
    opt_bias = family.norm == "layer" and bool(config.get("enable_bias", True))
    spec = ModelSpec(
        family=config["model_type"],
        n_layers=layers,
        d_model=d_model,
        d_ff=_size(config, family.d_ff, where),
        n_heads=heads,
        n_kv_heads=_size(config, "num_key_value_heads", where, heads),
        head_dim=_size(config, "head_dim", where, d_model // heads),
        vocab_size=_size(config, "vocab_size", where),
        max_context=_size(config, "max_position_embeddings", where),
        activation=_activation(config, family, where),
        dtype="f32",
        fingerprint=fingerprint,
        gated=family.gated,
        norm="layer" if family.norm == "layer" else "rms",
        norm_eps=float(config.get("rms_norm_eps", 1e-6 if family.norm == "rms" else 1e-5)),
        rope=_rope(config, where) if family.rope else None,
        qkv_bias=family.qkv_bias or bias or opt_bias,
        out_bias=bias or opt_bias,
        ffn_bias=bool(config.get("mlp_bias", False)) or opt_bias,
        qk_norm=family.qk_norm,
        tied=bool(config.get("tie_word_embeddings", family.tied_default)),
        sliding_window=window,
        sliding_layers=sliding,
    )
    if spec.n_heads % spec.n_kv_heads:
        raise ModelError(f"{where}: {heads} attention heads do not divide into {spec.n_kv_heads} key/value heads")
    return spec


def _family(config: Mapping[str, Any], where: str) -> Family:
    name = config.get("model_type")
    if name is None:
        raise ModelError(f"{where} has no field 'model_type'; expected one of {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise ModelError(f"{where}: unknown architecture '{name}'; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _size(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"{where} has no field '{name}'; the model cannot be built without it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where}: '{name}' is {value!r}, expected a whole number of at least 1")
    return value


def _activation(config: Mapping[str, Any], family: Family, where: str) -> Activation:
    name = config.get(family.activation)
    if name is None:
        raise ModelError(f"{where} has no field '{family.activation}'; expected one of {', '.join(ACTIVATIONS)}")
    if name not in ACTIVATIONS:
        raise ModelError(f"{where}: unknown activation '{name}'; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _refuse_unknown(config: Mapping[str, Any], family: Family, where: str) -> None:
    for name, value in family.only.items():
        if config.get(name, value) != value:
            raise ModelError(f"{where}: '{name}' is {config[name]!r}; only {value!r} is supported")
    proj = config.get("word_embed_proj_dim")
    if proj is not None and proj != config.get("hidden_size"):
        raise ModelError(f"{where}: 'word_embed_proj_dim' is {proj!r}; only the hidden size is supported")
    known = _READ | _HARMLESS | family.only.keys() | {family.d_ff, family.activation}
    for name, value in config.items():
        neutral = value is None or value is False or value in ({}, [])
        if name not in known and not neutral:
            raise ModelError(
                f"{where}: field '{name}' ({str(value)[:60]}) is not known for {config['model_type']} and may change "
                "the arithmetic; delete it from the file if you know that it does not"
            )


def _rope(config: Mapping[str, Any], where: str) -> RopeSpec:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known = {"rope_theta", "rope_type", "type"}
    try:
        if kind == "default":
            spec = RopeSpec(theta)
        elif kind == "linear":
            known |= {"factor"}
            spec = RopeSpec(theta, "linear", float(scaling["factor"]))
        elif kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            known |= {*names, "original_max_position_embeddings"}
            factor, low, high = (float(scaling[name]) for name in names)
            spec = RopeSpec(theta, "llama3", factor, low, high, int(scaling["original_max_position_embeddings"]))
        else:
            raise ModelError(f"{where}: unknown RoPE type '{kind}'; known are default, linear, llama3")
    except KeyError as error:
        raise ModelError(f"{where}: RoPE type '{kind}' has no field {error}") from error
    unknown = {name for name in scaling if name not in known and scaling[name] not in (None, 1.0)}
    if unknown:
        raise ModelError(f"{where}: RoPE field '{sorted(unknown)[0]}' is not known for type '{kind}'")
    return spec


def _sliding(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and, per layer, whether it applies; transformers' rules for Mistral and for Qwen."""
    window = config.get("sliding_window", family.sliding_default)
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        window = None
    if window is None or config["model_type"] in ("llama", "opt"):
        return None, (False,) * layers
    types = config.get("layer_types")
    if types is not None and len(types) == layers:
        return int(window), tuple(kind == "sliding_attention" for kind in types)
    first = config.get("max_window_layers", 28) if config["model_type"] != "mistral" else 0
    return int(window), tuple(layer >= first for layer in range(layers))
