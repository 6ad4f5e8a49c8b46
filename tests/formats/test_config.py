"""config.json: what is read, what is refused and how clearly."""

import pytest

from hybrid.errors import ModelError
from hybrid.formats.config import parse_config

LLAMA = {
    "model_type": "llama",
    "hidden_act": "relu",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
OPT = {
    "model_type": "opt",
    "activation_function": "relu",
    "vocab_size": 100,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def test_defaults_of_a_family():
    spec = parse_config(LLAMA)
    assert (spec.n_kv_heads, spec.head_dim, spec.gated, spec.norm, spec.tied) == (4, 8, True, "rms", False)
    assert spec.rope is not None and spec.rope.theta == 10000.0
    opt = parse_config(OPT)
    assert (opt.gated, opt.norm, opt.rope, opt.tied) == (False, "layer", None, True)
    assert opt.qkv_bias and opt.out_bias and opt.ffn_bias


@pytest.mark.parametrize("name", [name for name in LLAMA if name != "model_type"])
def test_each_needed_field_is_named_when_missing(name):
    with pytest.raises(ModelError, match=f"no field '{name}'"):
        parse_config({key: value for key, value in LLAMA.items() if key != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "unknown architecture 'mamba'; known are llama, mistral, qwen2, qwen3, opt"),
        ({"hidden_act": "tanh"}, "unknown activation 'tanh'"),
        ({"hidden_size": 0}, "'hidden_size' is 0, expected a whole number of at least 1"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' is '2'"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
        ({"logit_scale": 0.5}, "field 'logit_scale' .* may change the arithmetic"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config'"),
        ({"num_local_experts": 8}, "field 'num_local_experts'"),
        ({"pretraining_tp": 2}, "'pretraining_tp' is 2; only 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "unknown RoPE type 'yarn'"),
        ({"rms_norm_eps": [1]}, "'rms_norm_eps' is '.1.', expected a number"),
        ({"rms_norm_eps": -1.0}, "'rms_norm_eps' is '-1.0'"),
        ({"rope_theta": 0}, "'rope_theta' is '0'"),
        ({"rope_scaling": "linear"}, "RoPE scaling is 'linear', expected an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [2]}}, "'factor' is '.2.'"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' is 'false', expected true or false"),
        ({"model_type": ["llama"]}, "unknown architecture"),
        ({"hidden_act": ["relu"]}, "unknown activation"),
        ({"head_dim": 7}, "RoPE needs an even number"),
        ({"model_type": "mistral", "sliding_window": -3}, "'sliding_window' is -3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE type 'linear' has no field 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        parse_config(LLAMA | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_layer_norm_before": False}, "'do_layer_norm_before' is False"),
        ({"word_embed_proj_dim": 16}, "'word_embed_proj_dim' is 16"),
        ({"_remove_final_layer_norm": True}, "'_remove_final_layer_norm' is True"),
    ],
)
def test_variants_of_opt_are_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        parse_config(OPT | change)


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_an_unknown_field_that_is_switched_off_is_accepted(value):
    assert parse_config(LLAMA | {"some_new_feature": value}) == parse_config(LLAMA)


def test_sliding_window_layers():
    assert parse_config(LLAMA | {"model_type": "mistral", "sliding_window": 5}).sliding_layers == (True, True)
    assert parse_config(LLAMA | {"model_type": "mistral", "sliding_window": None}).sliding_window is None
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    assert parse_config(qwen).sliding_window is None
    assert parse_config(qwen | {"use_sliding_window": True}).sliding_layers == (False, True)
    no_window = {key: value for key, value in qwen.items() if key != "sliding_window"}
    assert parse_config(no_window | {"use_sliding_window": True}).sliding_window == 4096
    for wrong in (["chunked_attention", "full_attention"], ["full_attention"], 5):
        with pytest.raises(ModelError, match="'layer_types' is"):
            parse_config(qwen | {"use_sliding_window": True, "layer_types": wrong})
    # transformers' Mistral slides in every layer, whatever this field says.
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 5, "layer_types": ["full_attention"] * 2}
    assert parse_config(mistral).sliding_layers == (True, True)
    types = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert parse_config(qwen | types).sliding_layers == (True, False)
