"""`config.json` of a Hugging Face model folder to a `ModelSpec`, by the family's row of `hybrid.formats.families`.

A field that is not known here and is not neutral is refused by name, because running on with other arithmetic would
give wrong answers silently. One that only other families read is ignored with a notice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.errors import ModelError
from hybrid.formats.families import FAMILIES, Family
from hybrid.formats.fields import MOST, Fields
from hybrid.formats.rope_config import rope_spec, without_rope
from profiler.common.errors import shown
from profiler.common.spec import ModelSpec, RopeSpec

ACTIVATIONS: dict[str, str] = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "fatrelu": "fatrelu",
    "drelu": "drelu",
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
    "transformers.js_config", "cache_implementation",
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
    name, family = _family(config, where)
    fields = Fields(config, where, family.fields, family.defaults)
    heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = fields.size("head_dim", family.head_dim or d_model // heads or 1)
    layers = fields.size("num_hidden_layers", most=_MOST_LAYERS)
    without = without_rope(fields, family, layers)
    window, sliding = _sliding(fields, family, layers, without)
    scales = _scales(fields, family, d_model, head_dim)
    rope, other = _ropes(fields, family, head_dim, scales.score, notices)
    spec = ModelSpec(
        family=name,
        n_layers=layers,
        d_model=d_model,
        d_ff=fields.size("intermediate_size", family.ffn_multiple and family.ffn_multiple * d_model),
        n_heads=heads,
        n_kv_heads=_kv_heads(fields, family, heads),
        head_dim=head_dim,
        vocab_size=fields.size("vocab_size"),
        max_context=_context(fields, rope),
        activation=_activation(fields, family),
        dtype="f32",
        fingerprint=fingerprint,
        gated=family.gated,
        norm=family.norm,
        norm_eps=fields.number("rms_norm_eps", family.norm_eps) * scales.eps,
        rope=rope,
        other_rope=other,
        other_rope_layers=() if other is None else without or sliding or (False,) * layers,
        qkv_bias=fields.switch(family.qkv_bias),
        out_bias=fields.switch(family.out_bias),
        ffn_bias=fields.switch(family.ffn_bias),
        qk_norm=family.qk_norm,
        norms=family.norms,
        parallel=family.parallel,
        embedding_norm=family.embedding_norm,
        embedding_scale=scales.embedding,
        logit_scale=scales.logit,
        logit_cap=_logit_cap(fields, family),
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


class _Scales(NamedTuple):
    """Factors of the embedded tokens, of norms' eps, of attention's scores and of the logits."""

    embedding: float = 1.0
    eps: float = 1.0
    score: float = 1.0
    logit: float = 1.0


def _scales(fields: Fields, family: Family, d_model: int, head_dim: int) -> _Scales:
    if family.multipliers:
        # The residual is kept in units of what is added to it: every norm of it gives the same with eps in such units.
        unit, score = fields.number("residual_multiplier", 1.0), fields.number("attention_multiplier", 1.0)
        embedding, logit = fields.number("embedding_multiplier", 1.0), fields.number("logits_scaling", 1.0)
        return _Scales(embedding / unit, unit**-2, score * head_dim**0.5, 1 / logit)
    embedding = d_model**0.5 if family.scaled_embedding else 1.0
    if family.score_width is None:
        return _Scales(embedding)
    return _Scales(embedding, score=(head_dim / fields.number("query_pre_attn_scalar", family.score_width)) ** 0.5)


def _ropes(
    fields: Fields, family: Family, head_dim: int, score_scale: float, notices: list[str]
) -> tuple[RopeSpec | None, RopeSpec | None]:
    """That of most layers, and that of the others: layers without RoPE, or those with a window."""
    if family.rope_theta is None:
        return None, None
    rope = replace(rope_spec(fields, family, head_dim, notices), score_scale=score_scale)
    if family.no_rope_every is not None:
        return rope, RopeSpec(kind="none", score_scale=score_scale)
    if family.local_rope_theta is None:
        return rope, None
    return rope, replace(rope_spec(fields, family, head_dim, notices, local=True), score_scale=score_scale)


def _context(fields: Fields, rope: RopeSpec | None) -> int:
    """The most tokens: kinds of RoPE that stretch a shorter context do so by their factor."""
    longest = fields.size("max_position_embeddings")
    if rope is None or rope.kind not in ("dynamic", "yarn"):
        return longest
    return min(max(longest, int(rope.factor * rope.original_context)), MOST)


def _logit_cap(fields: Fields, family: Family) -> float | None:
    if family.capped is None:
        return None
    if fields.has("final_logit_softcapping") and fields.get("final_logit_softcapping") is None:
        return None
    (default,) = family.capped
    if default is None and fields.get("final_logit_softcapping") is None:
        return None
    return fields.number("final_logit_softcapping", default or 0.0)


def _nests_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not levels or any(_nests_deeper(each, levels - 1) for each in inner)


def _family(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """The name and row of the family. Raises `ModelError` for one that is not known."""
    name = config.get("model_type")
    known = ", ".join(name for name in FAMILIES if " " not in name)
    if name is None:
        raise ModelError(f"{where} has no field 'model_type'; expected one of {known}")
    if not isinstance(name, str) or name not in FAMILIES or " " in name:
        raise ModelError(f"{where}: unknown architecture {shown(name)}; known are {known}")
    found = None
    while found != name:
        found = name
        for field, value, variant in FAMILIES[found].variants:
            if config.get(field) == value:
                name = variant
    return name, FAMILIES[name]


def _kv_heads(fields: Fields, family: Family, heads: int) -> int:
    """As many as heads where the field is null, or missing in a family whose default does not divide them."""
    fits = family.kv_heads and heads % family.kv_heads == 0 and not fields.has("num_key_value_heads")
    return fields.size("num_key_value_heads", family.kv_heads if fits else heads)


def _activation(fields: Fields, family: Family) -> str:
    name = fields.get("hidden_act")
    if family.activation is not None:
        return family.activation
    if name is None:
        raise ModelError(
            f"{fields.where} has no field '{fields.name('hidden_act')}'; expected one of {', '.join(ACTIVATIONS)}"
        )
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(f"{fields.where}: unknown activation {shown(name)}; known are {', '.join(ACTIVATIONS)}")
    if name == "relu":
        return family.of_relu
    if name == "fatrelu":
        return f"fatrelu_{fields.number('hidden_act_param', 0.0, least=0.0)!r}"
    if name == "drelu" and not family.gated:
        raise ModelError(f"{fields.where}: drelu is of gate and up, and a {fields.get('model_type')} model has no gate")
    return ACTIVATIONS[name]


def _check_others(fields: Fields, family: Family, notices: list[str]) -> None:
    """Raise for a field that may change the arithmetic; `notices` get those that this family does not read."""
    for name in family.ignored:
        fields.get(name)
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


def _sliding(
    fields: Fields, family: Family, layers: int, without: tuple[bool, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    """The window and, per layer, whether it applies; neither where no layer has one. without: layers without RoPE."""
    rule = family.window
    if rule is None:
        return None, ()
    size = rule.size if not fields.has("sliding_window") else fields.get("sliding_window")
    size = None if size is None else fields.size("sliding_window", size)
    if rule.switch is not None and not fields.switch(rule.switch):
        size = None
    first = 0 if rule.first_layer is None else fields.number("max_window_layers", rule.first_layer, least=0)
    types = fields.get("layer_types")
    every = None if rule.every is None else fields.size("sliding_window_pattern", rule.every)
    if types is None and without:
        sliding = without
    elif types is None and every is not None:
        sliding = tuple((layer + 1) % every != 0 for layer in range(layers))
    elif types is None:
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
