"""`config.json` of a Hugging Face model folder to a `ModelSpec`, by the family's row of `hybrid.formats.families`.

A field that is not known here and is not neutral is refused by name, because running on with other arithmetic would
give wrong answers silently. One that only other families read is ignored with a notice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid.errors import ModelError
from hybrid.formats.families import FAMILIES, Family, Switch
from profiler.common.errors import shown
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
# Known to leave the arithmetic of inference alone: bookkeeping, training-only settings, token ids, output options, and
# settings of sampling, which transformers does not take from this file either.
_HARMLESS = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash",
    "use_cache", "initializer_range", "init_std", "layerdrop", "prefix", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "experts_implementation", "output_attentions", "output_hidden_states",
    "return_dict", "torchscript", "id2label", "label2id", "num_labels", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "is_decoder", "tokenizer_class", "task_specific_params", "finetuning_task", "license",
    "auto_map", "unsloth_version", "unsloth_fixed", "language", "is_llama_config", "model_max_length",
    "max_sequence_length", "gradient_checkpointing", "use_flash_attention_2", "_flash_attn_2_enabled",
    "transformers.js_config",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff",
    "encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "num_beam_groups",
    "diversity_penalty",
}  # fmt: skip
_HARMLESS_ENDINGS = ("_token_id", "dropout", "pdrop")
# What some families read; for others it has no part in the arithmetic. Biases that nothing asks for are refused when
# the weights are opened.
_OF_OTHERS = {
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "attention_bias", "mlp_bias", "enable_bias", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types",
}  # fmt: skip
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_MOST = 2**31 - 1  # of any size: kernels count in int32
_MOST_LAYERS = 2**16
_MOST_BYTES = 2**26  # of a JSON file; the largest index of shards known has 9 MB
_MOST_NESTING = 64


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelError` when `path` is missing, is not JSON, is absurd, or holds another type."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; a Hugging Face model folder has one")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if _nests_deeper(value, _MOST_NESTING):
            raise RecursionError
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); fetch the model again") from error
    except RecursionError as error:
        raise ModelError(f"{path} nests deeper than {_MOST_NESTING} levels; fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object; fetch the model again")
    return value


def parse_config(
    config: Mapping[str, Any], where: str = "config.json", fingerprint: str = "", notices: list[str] | None = None
) -> ModelSpec:
    """Build the `ModelSpec` that `config` describes; its dtype is set later, from the weights themselves.

    `notices` get what was ignored. Raises `ModelError` for an unknown architecture or activation, a missing or absurd
    field, or a field that would change the arithmetic in a way not known here.
    """
    notices = [] if notices is None else notices
    family = _family(config, where)
    fields = _Fields(config, where, family.fields)
    heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    layers = fields.size("num_hidden_layers", most=_MOST_LAYERS)
    window, sliding = _sliding(fields, family, layers)
    spec = ModelSpec(
        family=config["model_type"],
        n_layers=layers,
        d_model=d_model,
        d_ff=fields.size("intermediate_size"),
        n_heads=heads,
        n_kv_heads=_kv_heads(fields, family, heads),
        head_dim=fields.size("head_dim", family.head_dim or d_model // heads),
        vocab_size=fields.size("vocab_size"),
        max_context=fields.size("max_position_embeddings"),
        activation=_activation(fields),
        dtype="f32",
        fingerprint=fingerprint,
        gated=family.gated,
        norm=family.norm,
        norm_eps=fields.number("rms_norm_eps", family.norm_eps),
        rope=None if family.rope_theta is None else _rope(fields, family.rope_theta, notices),
        qkv_bias=fields.switch(family.qkv_bias),
        out_bias=fields.switch(family.out_bias),
        ffn_bias=fields.switch(family.ffn_bias),
        qk_norm=family.qk_norm,
        tied=fields.flag("tie_word_embeddings", family.tied),
        sliding_window=window,
        sliding_layers=sliding,
    )
    _check_others(fields, family, notices)
    if spec.rope is not None and spec.head_dim % 2:
        raise ModelError(f"{where}: 'head_dim' is {spec.head_dim}, RoPE needs an even number")
    if spec.n_heads % spec.n_kv_heads:
        raise ModelError(f"{where}: {heads} attention heads do not divide into {spec.n_kv_heads} key/value heads")
    return spec


class _Fields:
    """The fields of a JSON object, checked as they are asked for; null is as if missing. It knows which were not.

    names: the object's own names for some fields; None for those that count as missing there.
    """

    def __init__(self, values: Mapping[str, Any], where: str, names: Mapping[str, str | None] | None = None) -> None:
        self.where, self._values, self._names = where, values, names or {}
        self._asked = {"model_type"}

    def name(self, field: str) -> str:
        """What the object calls `field`."""
        return self._names.get(field, field) or field

    def get(self, field: str, default: Any = None) -> Any:
        name = self._names.get(field, field)
        if name is None:
            return default
        self._asked.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def has(self, field: str) -> bool:
        """Whether the field is there, though it be null."""
        return self._names.get(field, field) in self._values

    def size(self, field: str, default: int | None = None, most: int = _MOST) -> int:
        value = self.get(field, default)
        if value is None:
            raise ModelError(f"{self.where} has no field '{self.name(field)}'; the model cannot be built without it")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.wrong(field, value, f"a whole number of at least 1 and at most {most}")
        return value

    def number(self, field: str, default: float, least: float = 1e-30) -> float:
        value = self.get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= 1e30:
            raise self.wrong(field, str(value), f"a number of at least {least:g}, at most 1e+30")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, str(value), "true or false")
        return value

    def switch(self, rule: Switch | bool) -> bool:
        return rule if isinstance(rule, bool) else self.flag(rule.field, rule.default)

    def wrong(self, field: str, value: object, expected: str) -> ModelError:
        return ModelError(f"{self.where}: '{self.name(field)}' is {shown(value)}, expected {expected}")

    def rest(self) -> dict[str, Any]:
        """The fields that were never asked for."""
        return {name: value for name, value in self._values.items() if name not in self._asked}


def _nests_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_nests_deeper(each, levels - 1) for each in inner)


def _family(config: Mapping[str, Any], where: str) -> Family:
    name = config.get("model_type")
    if name is None:
        raise ModelError(f"{where} has no field 'model_type'; expected one of {', '.join(FAMILIES)}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"{where}: unknown architecture {shown(name)}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _kv_heads(fields: _Fields, family: Family, heads: int) -> int:
    """As many as heads where the field is null, or missing in a family whose default does not divide them."""
    fits = family.kv_heads and heads % family.kv_heads == 0 and not fields.has("num_key_value_heads")
    return fields.size("num_key_value_heads", family.kv_heads if fits else heads)


def _activation(fields: _Fields) -> Activation:
    name = fields.get("hidden_act")
    if name is None:
        raise ModelError(
            f"{fields.where} has no field '{fields.name('hidden_act')}'; expected one of {', '.join(ACTIVATIONS)}"
        )
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(f"{fields.where}: unknown activation {shown(name)}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _check_others(fields: _Fields, family: Family, notices: list[str]) -> None:
    """Raise for a field that may change the arithmetic; `notices` get those that this family does not read."""
    for name, value in family.only.items():
        if fields.get(name, value) != value:
            raise ModelError(f"{fields.where}: '{name}' is {shown(fields.get(name))}; only {value!r} is supported")
    width = fields.get("hidden_size")
    if fields.get("word_embed_proj_dim", width) != width:
        proj = shown(fields.get("word_embed_proj_dim"))
        raise ModelError(f"{fields.where}: 'word_embed_proj_dim' is {proj}; only the hidden size is supported")
    kind = fields.get("model_type")
    for name, value in fields.rest().items():
        if value in (None, False, {}, []) or name in _HARMLESS or name.endswith(_HARMLESS_ENDINGS):
            continue
        if name not in _OF_OTHERS:
            raise ModelError(
                f"{fields.where}: field {shown(name)} ({shown(value)}) is not known for {kind} and may change the "
                "arithmetic; delete it from the file if you know that it does not"
            )
        notices.append(f"config.json's '{name}' ({shown(value)}) has no part in a {kind} model and is ignored")


def _rope(fields: _Fields, theta: float, notices: list[str]) -> RopeSpec:
    """By transformers' rules: `rope_scaling` goes before `rope_parameters`, a base inside before one beside it."""
    older, newer = fields.get("rope_scaling"), fields.get("rope_parameters")
    scaling = older or newer or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{fields.where}: RoPE scaling is {shown(scaling)}, expected an object")
    if older and newer and older != newer:
        notices.append("config.json has 'rope_scaling' and 'rope_parameters': the former is used, the latter ignored")
    theta = fields.number("rope_theta", theta)
    inner = _Fields(scaling, fields.where)
    theta, kind = inner.number("rope_theta", theta), inner.get("rope_type", inner.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise ModelError(f"{fields.where}: unknown RoPE type {shown(kind)}; known are {', '.join(_ROPE_FIELDS)}")
    needed = _ROPE_FIELDS[kind]
    for name in needed:
        if inner.get(name) is None:
            raise ModelError(f"{fields.where}: RoPE type '{kind}' has no field '{name}'")
    numbers = [inner.number(name, 1.0) for name in needed]
    unknown = sorted(name for name, value in inner.rest().items() if name != "type" and value not in (None, 1.0))
    if unknown:
        raise ModelError(f"{fields.where}: RoPE field {shown(unknown[0])} is not known for type '{kind}'")
    if kind == "default":
        return RopeSpec(theta)
    return RopeSpec(theta, "linear", *numbers) if kind == "linear" else RopeSpec(theta, "llama3", *numbers)  # type: ignore[arg-type]


def _sliding(fields: _Fields, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and, per layer, whether it applies; neither where no layer has one."""
    rule = family.window
    if rule is None:
        return None, ()
    size = rule.size if not fields.has("sliding_window") else fields.get("sliding_window")
    size = None if size is None else fields.size("sliding_window", size)
    if rule.switch is not None and not fields.switch(rule.switch):
        size = None
    first = 0 if rule.first_layer is None else fields.number("max_window_layers", rule.first_layer, least=0)
    types = fields.get("layer_types")
    if types is None:
        sliding = tuple(layer >= first for layer in range(layers))
    elif isinstance(types, list) and len(types) == layers and all(kind in _LAYER_TYPES for kind in types):
        sliding = tuple(kind == "sliding_attention" for kind in types)
        if size is None and any(sliding):
            raise ModelError(
                f"{fields.where}: 'layer_types' asks for sliding attention, but there is no window; "
                "set 'sliding_window', or make all layers 'full_attention'"
            )
    else:
        raise fields.wrong("layer_types", types, f"{layers} of {', '.join(_LAYER_TYPES)}")
    return (size, sliding) if size is not None and any(sliding) else (None, ())
