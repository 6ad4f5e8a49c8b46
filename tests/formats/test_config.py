"""config.json: what is read, what is refused and how clearly."""

import pytest

from hybrid.errors import ModelError
from hybrid.formats.config import parse_config, read_json
from profiler.common.spec import RopeSpec

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
        ({"model_type": "mamba"}, "unknown architecture 'mamba'; known are llama, mistral, qwen2, qwen3, bamboo"),
        ({"hidden_act": "tanh"}, "unknown activation 'tanh'"),
        ({"hidden_size": 0}, "'hidden_size' is 0, expected a whole number of at least 1"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' is '2'"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
        ({"logit_scale": 0.5}, "field 'logit_scale' .* may change the arithmetic"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config'"),
        ({"num_local_experts": 8}, "field 'num_local_experts'"),
        ({"pretraining_tp": 2}, "'pretraining_tp' is 2; only 1"),
        ({"rope_scaling": {"rope_type": "xpos", "factor": 2.0}}, "unknown RoPE type 'xpos'"),
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
        ({"rope_parameters": {"rope_theta": 10.0}, "rope_scaling": {"type": "xpos", "factor": 2.0}}, "type 'xpos'"),
        ({"rope_theta": 10**400}, "'rope_theta' is '1000.*, expected a number of at least 1e-30, at most 1e.30"),
        ({"model_type": "lla\nma"}, r"unknown architecture 'lla\\nma'"),
        ({"hidden_act": "\ud800"}, r"unknown activation '\\ud800'"),
        ({"logit_\nscale": "long" * 1000}, r"field 'logit_\\nscale' \('long.{0,80}\) is not known"),
        ({"layer_types": ["sliding_attention"] * 2, "model_type": "qwen3"}, "there is no window; set 'sliding_window'"),
        (
            {"layer_types": ["sliding_attention", "full_attention"], "model_type": "mistral", "sliding_window": None},
            "there is no window; set 'sliding_window'",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        parse_config(LLAMA | change)


@pytest.mark.parametrize("name", [name for name, value in LLAMA.items() if isinstance(value, int)])
@pytest.mark.parametrize("size", [0, -1, 10**10, 10**30, 1e9, True, float("nan"), float("inf"), [2], "2"])
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(name, size):
    with pytest.raises(ModelError, match=f"'{name}' is .{{1,50}}, expected a whole number of at least 1"):
        parse_config(LLAMA | {name: size})


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


@pytest.mark.parametrize(
    "change",
    [
        {"max_sequence_length": 2048},
        {"max_length": 20, "temperature": 0.7, "repetition_penalty": 1.1},
        {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "classifier_dropout": 0.1},
        {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        {"mask_token_id": 3, "unk_token_id": 0, "num_labels": 1, "_commit_hash": "abc", "torchscript": True},
    ],
)
def test_bookkeeping_is_accepted_without_a_word(change):
    notices = []
    assert parse_config(LLAMA | change, notices=notices) == parse_config(LLAMA) and notices == []


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (LLAMA, {"sliding_window": 5}),
        (LLAMA, {"enable_bias": True}),
        (LLAMA | {"model_type": "mistral"}, {"attention_bias": True}),
        (LLAMA | {"model_type": "qwen2"}, {"mlp_bias": True}),
        (OPT, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        (OPT, {"num_key_value_heads": 1}),
        (OPT, {"rms_norm_eps": 0.5}),
    ],
)
def test_a_field_that_only_other_families_read_is_ignored_with_a_notice(base, change):
    notices = []
    assert parse_config(base | change, notices=notices) == parse_config(base)
    (notice,) = notices
    assert f"'{next(iter(change))}'" in notice and notice.endswith("is ignored")


# What published files of these families say beside sizes.
PUBLISHED = [
    ({"model_type": "smollm3", "pretraining_tp": 2, "no_rope_layers": [1, 0], "rope_theta": 5e6}, {}),
    (
        {"model_type": "gemma3_text", "cache_implementation": "hybrid", "rope_scaling": None, "sliding_window": 512}
        | {"rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window_pattern": 6, "head_dim": 256}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"logit_cap": None, "embedding_scale": 32**0.5, "activation": "gelu_tanh"},
    ),
    (
        {"model_type": "nemotron", "rope_percent": 0.5, "partial_rotary_factor": 0.5, "norm_eps": 1e-5},
        {"rope": RopeSpec(turned=4)},
    ),
    (
        {"model_type": "falcon", "activation": "relu", "num_kv_heads": 4, "multi_query": True, "n_head": None}
        | {"apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "num_key_value_heads": 4},
        {"n_kv_heads": 1, "d_ff": 128, "parallel": True},
    ),
    (
        {"model_type": "arcee", "hidden_act": "relu2"}
        | {"rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0, "rope_type": "yarn"}}
        | {"original_max_position_embeddings": 32},
        {"max_context": 640, "gated": False},
    ),
    (
        {
            "model_type": "phi3",
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 2048,
            "embd_pdrop": 0.0,
        }
        | {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "sliding_window": 99}
        | {"auto_map": {"AutoConfig": "x.y"}, "rope_theta": 10000.0},
        {"sliding_window": 99, "max_context": 2048},
    ),
    (
        {"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": 0.01},
        {"activation": "fatrelu_0.01", "fires_sparsely": True},
    ),
    ({"model_type": "llama_sparse_relu", "hidden_act": "silu"}, {"activation": "relu"}),
    ({"model_type": "bamboo", "hidden_act": "relu", "sliding_window": 4096}, {"activation": "drelu"}),
]


def base(says):
    """Sizes, and an activation by the name that most families have for it."""
    others = {"gemma3_text": {"hidden_act"}, "falcon": {"hidden_act", "intermediate_size"}}
    return {name: value for name, value in LLAMA.items() if name not in others.get(says["model_type"], ())}


@pytest.mark.parametrize(("says", "means"), PUBLISHED, ids=[says["model_type"] for says, _ in PUBLISHED])
def test_what_published_files_say(says, means):
    spec = parse_config(base(says) | says)
    assert {name: getattr(spec, name) for name in means} == means


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"model_type": "falcon", "alibi": True}, "'alibi' is True; only False is supported"),
        ({"model_type": "falcon", "parallel_attn": False}, "'parallel_attn' is False"),
        ({"model_type": "falcon", "multi_query": False}, "'multi_query' is False"),
        ({"model_type": "persimmon", "qk_layernorm": False}, "'qk_layernorm' is False"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "'attn_logit_softcapping' is 30.0"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "expected 2 of 0 and 1"),
        ({"model_type": "nemotron", "partial_rotary_factor": 0.45}, "turns 3 of 8 elements of a head"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "no field 'long_factor'"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "expected 4 numbers above 0",
        ),
        ({"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": -1.0}, "a number of at least 0"),
        ({"model_type": "arcee", "hidden_act": "drelu"}, "drelu is of gate and up"),
        ({"model_type": "granite", "residual_multiplier": 0}, "'residual_multiplier' is '0'"),
        ({"model_type": "falcon grouped"}, "unknown architecture"),
    ],
)
def test_what_would_change_the_arithmetic_of_a_family_is_refused(says, message):
    with pytest.raises(ModelError, match=message):
        parse_config(base(says) | says)


def test_rope_scaling_goes_before_rope_parameters():
    notices = []
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    both["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    spec = parse_config(LLAMA | both, notices=notices)
    # The base of the field that is not used is not used either.
    assert spec.rope == RopeSpec(10000.0, "linear", 2.0, original_context=128)
    assert len(notices) == 1 and "'rope_scaling' and 'rope_parameters'" in notices[0]
    both["rope_parameters"] = both["rope_scaling"]
    assert parse_config(LLAMA | both | {"rope_theta": 7.0}, notices=notices).rope == RopeSpec(
        7.0, "linear", 2.0, original_context=128
    )
    assert len(notices) == 1
    assert parse_config(LLAMA | {"rope_theta": 7.0, "rope_scaling": {"rope_theta": None}}).rope == RopeSpec(7.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nests deeper than 64 levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "nests deeper than 64 levels"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "is not readable JSON"),
        (" " * (2**26 + 1), "more than 64 MiB"),
        ('{"a": "\xff"}'.encode("latin-1"), "is not readable JSON"),
        ("[1]", "holds a list"),
    ],
    ids=["unclosed", "nested", "digits", "size", "encoding", "list"],
)
def test_hostile_json_is_one_line(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


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
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 5}
    assert parse_config(mistral | {"layer_types": ["full_attention"] * 2}).sliding_window is None
    assert parse_config(mistral | {"layer_types": ["full_attention", "sliding_attention"]}).sliding_layers == (
        False,
        True,
    )
    types = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert parse_config(qwen | types).sliding_layers == (True, False)
