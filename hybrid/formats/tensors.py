"""Which tensors a model's checkpoint must have, where its parts lie in them, and what may lie beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from hybrid.errors import ModelError
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.families import FAMILIES
from hybrid.formats.folds import Stored, in_turned_order, turned_order
from profiler.common.errors import shown
from profiler.common.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]

# Recomputed from config.json here, so that nobody need hear of them.
_CACHES = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$")
# Of no part in the next token's logits, by what they are.
_NO_PART = {
    "a head of another task": re.compile(r"^(v_head|value_head|reward_head|score|classifier)\."),
    "scales of a quantised KV cache": re.compile(r"\.self_attn\.((q|k|v|qkv)_proj\.|attn\.)?(q|k|v|kv|prob)_scale$"),
    "masks, which are made anew": re.compile(r"\.(masked_bias|causal_mask)$"),
}
_REMEDIES = {
    "merge the adapter into the weights first (peft: merge_and_unload)": re.compile(
        r"\.(lora_\w+|base_layer|modules_to_save|ia3_\w+)(\.|$)"
    ),
    "weights quantised that way are not read: give the model in bf16, f16 or f32": re.compile(
        r"\.(weight_\w+|input_scale|output_scale|qweight|qzeros|scales|g_idx|absmax)(\.|$)"
    ),
}
_LAST_REMEDY = (
    "config.json and weights do not match; save_pretrained of transformers leaves out what a model does not use"
)


class TensorNames:
    """A model's tensors in a checkpoint, whose names lack the leading word where it was saved without its head.

    Of a tied embedding and head either may be the one that was stored.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self._spec, self._family = spec, FAMILIES[spec.family]
        self._tensors = self._family.tensors
        self._prefix = self._tensors["embedding"].partition(".")[0] + "."
        self._prefixed = any(name.startswith(self._prefix) for name in checkpoint.infos)
        stored = {part for part in ("embedding", "head") if f"{self._plain(part)}.weight" in checkpoint.infos}
        self._embedding = "head" if spec.tied and stored == {"head"} else "embedding"

    def of(self, part: str, layer: int | None = None) -> str:
        """The checkpoint's name of `part`, such as `gate`, without `.weight` or `.bias`."""
        return self._plain(self._embedding if part == "embedding" else part, layer)

    def _plain(self, part: str, layer: int | None = None) -> str:
        name = self._tensors[part].format(layer)
        return name if self._prefixed else name.removeprefix(self._prefix)

    def stored(self, part: str, layer: int | None = None, kind: str = "weight") -> Stored | None:
        """Where `part` lies; None for a norm without weights. Its shape is as in `outer_shapes` and `layer_shapes`."""
        if part not in self._tensors:
            return None
        spec, name, shape = self._spec, f"{self.of(part, layer)}.{kind}", self._shapes[f"{part}.{kind}"]
        is_norm = part.endswith("norm") and kind == "weight"
        times = spec.logit_scale if part == "final_norm" else 1.0
        plus = self._family.norm_plus * times if is_norm else 0.0
        rows = None
        if part in self._family.rows:
            count, rows = self._family.rows[part](spec)
            shape = (count, *shape[1:])
        if part in ("q", "k", "q_norm", "k_norm") and self._turned is not None:
            rows = in_turned_order(np.arange(shape[0]) if rows is None else rows, self._turned)
        return Stored(name, shape, rows, times, plus)

    @cached_property
    def _shapes(self) -> Shapes:
        return outer_shapes(self._spec) | layer_shapes(self._spec)

    @cached_property
    def _turned(self) -> np.ndarray | None:
        return turned_order(self._spec, self._family.sine_turned)


def outer_shapes(spec: ModelSpec) -> Shapes:
    """The shape of each tensor that belongs to no layer, by part and kind, such as `final_norm.weight`."""
    vocabulary = (spec.vocab_size, spec.d_model)
    shapes = {"embedding.weight": vocabulary} | _norm(spec, "final_norm")
    if spec.rope is None:
        shapes["positions.weight"] = (spec.max_context + 2, spec.d_model)
    return shapes if spec.tied else shapes | {"head.weight": vocabulary}


def layer_shapes(spec: ModelSpec) -> Shapes:
    """The shape of each tensor of a layer, by part and kind, such as `q.bias`; matrices are [outputs, inputs]."""
    d, q, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    shapes: Shapes = {}
    for part in layer_norms(spec):
        shapes |= _norm(spec, part)
    for part, rows, columns, bias in (
        ("q", q, d, spec.qkv_bias),
        ("k", kv, d, spec.qkv_bias),
        ("v", kv, d, spec.qkv_bias),
        ("out", d, q, spec.out_bias),
        *((("gate", spec.d_ff, d, spec.ffn_bias),) if spec.gated else ()),
        ("up", spec.d_ff, d, spec.ffn_bias),
        ("down", d, spec.d_ff, spec.ffn_bias),
    ):
        shapes |= {f"{part}.weight": (rows, columns)} | ({f"{part}.bias": (rows,)} if bias else {})
    for part, count in (("q_norm", spec.q_norm_size), ("k_norm", spec.k_norm_size)) if spec.qk_norm else ():
        shapes |= {f"{part}.weight": (count,)} | ({f"{part}.bias": (count,)} if spec.qk_norm == "head layer" else {})
    return shapes


def layer_norms(spec: ModelSpec) -> tuple[str, ...]:
    """The norms of a layer before and after attention and FFN."""
    before = ("attention_norm", "ffn_norm") if spec.norms != "after" else ()
    return before + (("attention_post_norm", "ffn_post_norm") if spec.norms != "before" else ())


def check_tensors(spec: ModelSpec, checkpoint: Checkpoint, notices: list[str]) -> None:
    """Raise `ModelError` for a tensor that is missing, of another shape or type, or of unknown use.

    `notices` get those that are ignored.
    """
    names = TensorNames(spec, checkpoint)
    needed = set()
    for stored in _all(spec, names):
        checkpoint.info(stored.name, stored.shape)
        needed.add(stored.name)
    rest = sorted(checkpoint.infos.keys() - needed)
    if spec.tied:  # and the head stored again, the same
        rest = [name for name in rest if name != f"{names.of('head')}.weight"]
    rest = [name for name in rest if not _CACHES.search(name)]
    for what, pattern in _NO_PART.items():
        found = [name for name in rest if pattern.search(name)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            notices.append(
                f"the checkpoint's {shown(found[0])}{more} ({what}) has no part in the answer and is ignored"
            )
        rest = [name for name in rest if name not in found]
    if rest:
        remedy = next((text for text, pattern in _REMEDIES.items() if pattern.search(rest[0])), _LAST_REMEDY)
        raise ModelError(
            f"{checkpoint.folder} has tensor {shown(rest[0])} that config.json gives no place to; {remedy}"
        )


def _norm(spec: ModelSpec, part: str) -> Shapes:
    kinds = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{part}.{kind}": (spec.d_model,) for kind in kinds}


def _all(spec: ModelSpec, names: TensorNames) -> Iterator[Stored]:
    """Each tensor that the model needs; one that is several parts comes several times."""
    keys = [(None, key) for key in outer_shapes(spec)]
    keys += [(layer, key) for layer in range(spec.n_layers) for key in layer_shapes(spec)]  # type: ignore[misc]
    for layer, key in keys:
        part, _, kind = key.partition(".")
        if (stored := names.stored(part, layer, kind)) is not None:
            yield stored
