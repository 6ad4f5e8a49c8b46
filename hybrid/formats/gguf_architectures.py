"""llama.cpp's architectures as rows of data: the family each one is, what its converter did to the weights, and which
metadata is which field of config.json. A new architecture is a new row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hybrid.errors import ModelError
from hybrid.formats.families import FAMILIES, Family
from hybrid.formats.gguf_file import GGUFFile
from profiler.common.errors import shown

# Tensors by the parts of `hybrid.formats.families`.
_PARTS = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "out": "blk.{}.attn_output",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "attention_norm": "blk.{}.attn_norm",
    "ffn_norm": "blk.{}.ffn_norm",
    "attention_post_norm": "blk.{}.post_attention_norm",
    "ffn_post_norm": "blk.{}.post_ffw_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}
# config.json's fields by the metadata's keys, which begin with the architecture's name.
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
ROPE_FACTORS = "rope_freqs.weight"
ACTIVATION_KEY = "hybrid.hidden_act"  # llama.cpp has no key for it; our own writer says what the model computes


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`. What a row leaves out is as for qwen2.

    model_type: the family. paired: RoPE turns neighbouring rows of a head in llama.cpp: its converter moved those of q
    and k. joined: it put the rows of all queries, keys and values one after another. fields: of config.json, besides
    those of all, by the metadata's keys. constants: fields that the metadata does not have. parts: tensors that are
    called otherwise. switches: fields that are true where a tensor is there. variants: rows to take in this one's place
    where a tensor is there. variant: of the family. neuron_major: the file has `down` as neurons by outputs.
    """

    model_type: str
    paired: bool = False
    joined: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None
    neuron_major: bool = False

    @property
    def family(self) -> Family:
        """The family's row, or that of its variant."""
        return FAMILIES[self.variant or self.model_type]

    def names(self) -> dict[str, str]:
        """GGUF's names of the family's parts, both with `{}` for the layer."""
        known = _PARTS | dict(self.parts)
        return {part: known[part] for part in self.family.tensors if part in known}


_LLAMA_BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GEMMA = {
    "sliding_window": "attention.sliding_window",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
}
_FOUR_NORMS = {"attention_post_norm": "blk.{}.post_attention_norm", "ffn_post_norm": "blk.{}.post_ffw_norm"}
_FALCON_BIASES = {"bias": "blk.0.ffn_up.bias"}
_QKV = dict.fromkeys(("q", "k", "v"), "blk.{}.attn_qkv")

# What llama.cpp's converter adds to the weights of norms is what the family's row says is added to them.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", paired=True, switches=_LLAMA_BIASES),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "arcee": Architecture("arcee", paired=True, switches=_LLAMA_BIASES),
    "granite": Architecture("granite", paired=True, fields=_MULTIPLIERS, switches=_LLAMA_BIASES),
    "smollm3": Architecture("smollm3", paired=True, switches=_LLAMA_BIASES),
    "nemotron": Architecture("nemotron", switches=_LLAMA_BIASES),
    "jais2": Architecture("jais2"),
    "olmo2": Architecture("olmo2"),
    "gemma3": Architecture("gemma3_text", parts=_FOUR_NORMS, fields=_GEMMA),
    "falcon": Architecture(
        "falcon",
        joined=True,
        constants={"multi_query": True, "parallel_attn": True},
        parts=_QKV | {"ffn_norm": "blk.{}.attn_norm"},
        switches=_FALCON_BIASES,
        variants={"blk.0.attn_norm_2.weight": "falcon grouped"},
    ),
    "falcon grouped": Architecture(
        "falcon",
        joined=True,
        constants={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        parts=_QKV | {"attention_norm": "blk.{}.attn_norm_2", "ffn_norm": "blk.{}.attn_norm"},
        switches=_FALCON_BIASES,
        variant="falcon grouped",
    ),
    "phi3": Architecture(
        "phi3", parts=_QKV | {"gate": "blk.{}.ffn_up"}, fields={"sliding_window": "attention.sliding_window"}
    ),
}
# PowerInfer's files, of models that fire sparsely: no key says so, the format does.
_DOWN = {"down": "blk.{}.ffn_down_t"}
_RELU = {"hidden_act": "relu"}
POWERINFER: dict[str, Architecture] = {
    name: Architecture(name, paired=True, constants=_RELU, parts=_DOWN, neuron_major=True)
    for name in ("llama", "bamboo")
} | {
    name: replace(row, constants={**row.constants, **_RELU}, parts={**row.parts, **_DOWN}, neuron_major=True)
    for name, row in ARCHITECTURES.items()
    if row.model_type == "falcon"
}


def architecture_of(file: GGUFFile) -> Architecture:
    """The row of a file. Raises `ModelError` where there is none."""
    name, known = file.metadata.get("general.architecture"), POWERINFER if file.powerinfer else ARCHITECTURES
    if not isinstance(name, str) or name not in known:
        whose = "PowerInfer architecture" if file.powerinfer else "architecture"
        names = (row for row in known if " " not in row)  # the others are variants
        raise ModelError(f"{file.path}: unknown {whose} {shown(name)}; known are {', '.join(names)}")
    row = known[name]
    return next((known[other] for tensor, other in row.variants.items() if tensor in file.tensors), row)


def config_of(file: GGUFFile) -> dict[str, Any]:
    """What config.json would say. Raises `ModelError` for metadata that is missing or that nothing here can compute."""
    row = architecture_of(file)
    metadata = _Metadata(file)
    config: dict[str, Any] = {"model_type": row.model_type, **row.constants}
    config |= {name: metadata.get(key) for name, key in (_SIZES | dict(row.fields)).items()}
    for name, key in _SIZES.items():
        # No layer is without a tensor, and no size is beyond what one dimension of a tensor can have in any file.
        most = len(file.tensors) if name == "num_hidden_layers" else 2**31 - 1
        if config[name] is not None and (type(config[name]) is not int or not 1 <= config[name] <= most):
            raise metadata.wrong(key, config[name], f"a whole number from 1 to {most}")
    config["rope_theta"] = theta = metadata.get("rope.freq_base")
    if theta is not None and (type(theta) is not float or not 0 < theta < 1e30):
        raise metadata.wrong("rope.freq_base", theta, "a number above 0")
    kind = "layer_norm" if row.family.norm == "layer" else "layer_norm_rms"
    config["rms_norm_eps"] = metadata.get(f"attention.{kind}_epsilon")
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    embedding = file.tensors.get("token_embd.weight")
    config["vocab_size"] = embedding.shape[0] if embedding and len(embedding.shape) == 2 else None
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config.setdefault("hidden_act", row.family.defaults.get("hidden_act", "silu"))
    config["hidden_act"] = file.metadata.get(ACTIVATION_KEY, config["hidden_act"])
    config |= {name: tensor in file.tensors for name, tensor in row.switches.items()}
    config |= {f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    _add_head_size(config, metadata, row.family)
    rope = _rope(config, metadata)
    if rope is not None:
        config["rope_parameters"] = rope if row.family.local_rope_theta is None else {"full_attention": rope}
    if row.family.score_width is not None and config["head_dim"]:
        # As llama.cpp has it, which knows the one model whose scores have another width by its layers.
        is_largest = config["num_hidden_layers"] == 62
        width = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
        config["query_pre_attn_scalar"] = width
    names = {name: row.family.fields.get(name, name) for name in config}
    return {names[name] or name: value for name, value in config.items() if value is not None and names[name]}


class _Metadata:
    """The metadata of the file's architecture; those of no model's arithmetic are not asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self._prefix = file, file.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """A number or a text; of numbers by layer the one that all have. Raises `ModelError` where they differ."""
        value = self.file.metadata.get(f"{self._prefix}.{key}", default)
        if isinstance(value, np.ndarray):
            found = np.unique(value)
            if len(found) != 1:
                raise self.wrong(key, value.tolist(), "the same number for all layers")
            return found[0].item()
        return value

    def wrong(self, key: str, value: object, expected: str) -> ModelError:
        return ModelError(f"{self.file.path}: '{self._prefix}.{key}' is {shown(value)}, expected {expected}")


def _add_head_size(config: dict[str, Any], metadata: _Metadata, family: Family) -> None:
    """The size of a head, and the share of it that RoPE turns where that is not all of it."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if heads is None or width is None:
        return  # which the reader of the configuration says better
    size = config["head_dim"] = config["head_dim"] or width // heads
    values, turned = metadata.get("attention.value_length", size), metadata.get("rope.dimension_count", size)
    if values != size:
        raise metadata.wrong("attention.value_length", values, f"the length of keys, {size}")
    if turned != size or family.partial is not None:
        config["partial_rotary_factor"] = turned / size if isinstance(turned, int) and size else turned


def _rope(config: Mapping[str, Any], metadata: _Metadata) -> dict[str, Any] | None:
    """The field `rope_parameters`; None where positions are as they are. Raises `ModelError`."""
    kind, factor = metadata.get("rope.scaling.type"), metadata.get("rope.scaling.factor")
    factor = factor or metadata.get("rope.scale_linear")
    original = metadata.get("rope.scaling.original_context_length")
    if ROPE_FACTORS in metadata.file.tensors:
        return _llama3(config, metadata.file)
    if kind in (None, "none") and not (factor and kind is None):
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor} if factor not in (None, 0.0, 1.0) else None
    named = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    more = {"attention_factor": "attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    named |= {name: metadata.get(f"rope.scaling.{key}") for name, key in more.items()}
    return {name: value for name, value in named.items() if value is not None}


def _llama3(config: Mapping[str, Any], file: GGUFFile) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF has as the factor of each frequency, by the numbers that it was made of.

    low_freq_factor and high_freq_factor are 1 and 4 in all Llama 3; a factor between tells the original context. Raises
    `ModelError` for factors that no such numbers give.
    """
    tensor, size = file.tensors[ROPE_FACTORS], config.get("head_dim")
    if not isinstance(size, int) or tensor.type != "F32" or tensor.shape != (size // 2,):
        raise ModelError(
            f"{file.path}: '{ROPE_FACTORS}' is {tensor.type} {list(tensor.shape)}, expected F32 [{size} / 2]"
        )
    factors = np.fromfile(file=tensor.path, dtype=np.float32, count=size // 2, offset=tensor.start).astype(np.float64)
    theta = config.get("rope_theta") or 10000.0
    lengths = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    largest = round(float(factors.max()), 4)
    between = (factors > 1.001) & (factors < 0.999 * largest)
    share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest) if largest > 1 else np.empty(0)
    found = lengths[between] * (3 * share + 1)
    for original in {8192, *(round(float(length)) for length in found[:1])}:
        if np.allclose(_llama3_factors(lengths, largest, original), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise ModelError(f"{file.path}: '{ROPE_FACTORS}' are not those of Llama 3's scaling, which is the only one read")


def _llama3_factors(lengths: np.ndarray, factor: float, original: int) -> np.ndarray:
    """What Llama 3 divides frequencies of such wavelengths by."""
    smooth = np.clip((original / lengths - 1) / 3, 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
