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
from profiler.common.spec import Activation, ModelSpec, RopeSpec

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
    optional_window: bool = False
    head_dim: int | None = None
    only: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(only={"pretraining_tp": 1}),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True, optional_window=True),
    "qwen3": Family(qk_norm=True, optional_window=True, head_dim=128),
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
    "auto_map", "unsloth_version", "unsloth_fixed", "language", "is_llama_config",
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
    window, sliding = _sliding(config, family, layers, where)
    bias = _flag(config, "attention_bias", where, False)
    opt_bias = family.norm == "layer" and _flag(config, "enable_bias", where, True)
    spec = ModelSpec(
        family=config["model_type"],
        n_layers=layers,
        d_model=d_model,
        d_ff=_size(config, family.d_ff, where),
        n_heads=heads,
        n_kv_heads=_size(config, "num_key_value_heads", where, heads),
        head_dim=_size(config, "head_dim", where, family.head_dim or d_model // heads),
        vocab_size=_size(config, "vocab_size", where),
        max_context=_size(config, "max_position_embeddings", where),
        activation=_activation(config, family, where),
        dtype="f32",
        fingerprint=fingerprint,
        gated=family.gated,
        norm="layer" if family.norm == "layer" else "rms",
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6) if family.norm == "rms" else 1e-5,
        rope=_rope(config, where) if family.rope else None,
        qkv_bias=family.qkv_bias or bias or opt_bias,
        out_bias=bias or opt_bias,
        ffn_bias=_flag(config, "mlp_bias", where, False) or opt_bias,
        qk_norm=family.qk_norm,
        tied=_flag(config, "tie_word_embeddings", where, family.tied_default),
        sliding_window=window,
        sliding_layers=sliding,
    )
    if spec.rope is not None and spec.head_dim % 2:
        raise ModelError(f"{where}: 'head_dim' is {spec.head_dim}, RoPE needs an even number")
    if spec.n_heads % spec.n_kv_heads:
        raise ModelError(f"{where}: {heads} attention heads do not divide into {spec.n_kv_heads} key/value heads")
    return spec


def _family(config: Mapping[str, Any], where: str) -> Family:
    name = config.get("model_type")
    if name is None:
        raise ModelError(f"{where} has no field 'model_type'; expected one of {', '.join(FAMILIES)}")
    if not isinstance(name, str) or name not in FAMILIES:
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


def _number(config: Mapping[str, Any], name: str, where: str, default: float, least: float = 1e-30) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < float("inf"):
        raise ModelError(f"{where}: '{name}' is {str(value)[:60]!r}, expected a number of at least {least:g}")
    return value


def _flag(config: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ModelError(f"{where}: '{name}' is {str(value)[:60]!r}, expected true or false")
    return value


def _activation(config: Mapping[str, Any], family: Family, where: str) -> Activation:
    name = config.get(family.activation)
    if name is None:
        raise ModelError(f"{where} has no field '{family.activation}'; expected one of {', '.join(ACTIVATIONS)}")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(f"{where}: unknown activation '{name}'; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _refuse_unknown(config: Mapping[str, Any], family: Family, where: str) -> None:
    for name, value in family.only.items():
        if config.get(name) not in (None, value):
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
    if not isinstance(scaling, dict):
        raise ModelError(f"{where}: RoPE scaling is {str(scaling)[:60]!r}, expected an object")
    fields = {"rope_theta": config.get("rope_theta"), **scaling}
    theta = _number(fields, "rope_theta", where, 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in needed:
        raise ModelError(f"{where}: unknown RoPE type '{kind}'; known are {', '.join(needed)}")
    for name in needed[kind]:
        if scaling.get(name) is None:
            raise ModelError(f"{where}: RoPE type '{kind}' has no field '{name}'")
    known = {"rope_theta", "rope_type", "type", *needed[kind]}
    unknown = sorted(name for name, value in scaling.items() if name not in known and value not in (None, 1.0))
    if unknown:
        raise ModelError(f"{where}: RoPE field '{unknown[0]}' is not known for type '{kind}'")
    numbers = [_number(scaling, name, where, 1.0) for name in needed[kind]]
    if kind == "default":
        return RopeSpec(theta)
    return RopeSpec(theta, "linear", *numbers) if kind == "linear" else RopeSpec(theta, "llama3", *numbers)  # type: ignore[arg-type]


def _sliding(config: Mapping[str, Any], family: Family, layers: int, where: str) -> tuple[int | None, tuple[bool, ...]]:
    """The window and, per layer, whether it applies, by transformers' rules.

    Mistral's window is every layer's. Qwen's applies where `layer_types` says so, or from `max_window_layers` on.
    """
    name = config["model_type"]
    window = config.get("sliding_window", 4096)
    if name in ("llama", "opt") or window is None or (family.optional_window and not config.get("use_sliding_window")):
        return None, (False,) * layers
    size = _size({"sliding_window": window}, "sliding_window", where)
    if not family.optional_window:
        return size, (True,) * layers
    types = config.get("layer_types")
    if types is None:
        first = _number(config, "max_window_layers", where, 28, least=0)
        return size, tuple(layer >= first for layer in range(layers))
    known = {"sliding_attention", "full_attention"}
    if not isinstance(types, list) or len(types) != layers or not known.issuperset(map(str, types)):
        raise ModelError(
            f"{where}: 'layer_types' is {str(types)[:60]}, expected {layers} of {', '.join(sorted(known))}"
        )
    return size, tuple(kind == "sliding_attention" for kind in types)
