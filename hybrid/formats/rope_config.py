"""RoPE as config.json describes it, by transformers' rules, to a `RopeSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybrid.errors import ModelError
from hybrid.formats.families import Family
from hybrid.formats.fields import Fields
from profiler.common.errors import shown
from profiler.common.spec import RopeSpec

# What each kind must say, and what it may.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        (
            *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}
_NESTED = ("full_attention", "sliding_attention")


def rope_spec(fields: Fields, family: Family, head_dim: int, notices: list[str], local: bool = False) -> RopeSpec:
    """`rope_scaling` goes before `rope_parameters`, a base inside before one beside it.

    local: that of layers with a window, where they have their own. Raises `ModelError` for what is not known.
    """
    inner = Fields(_parameters(fields, family, notices, local), fields.where)
    theta = family.rope_theta if not local else family.local_rope_theta
    theta = fields.number("rope_theta" if not local else "rope_local_base_freq", theta or 1.0)
    theta, kind = inner.number("rope_theta", theta), inner.get("rope_type", inner.get("type", "default"))
    if kind in ("su", "yarn") and inner.get("long_factor"):
        kind = "longrope"  # as it was once called
    fields.get("original_max_position_embeddings")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ModelError(f"{fields.where}: unknown RoPE type {shown(kind)}; known are {', '.join(_FIELDS)}")
    needed, optional = _FIELDS[kind]
    for name in needed:
        if inner.get(name) is None:
            raise ModelError(f"{fields.where}: RoPE type '{kind}' has no field '{name}'")
    for name in optional:
        inner.get(name)
    turned = _turned(fields, inner, family, head_dim)
    spec = _of_kind(kind, theta, turned, head_dim, fields, inner)
    unknown = sorted(name for name, value in inner.rest().items() if name != "type" and value not in (None, 1.0))
    if unknown:
        raise ModelError(f"{fields.where}: RoPE field {shown(unknown[0])} is not known for type '{kind}'")
    return spec


def without_rope(fields: Fields, family: Family, layers: int) -> tuple[bool, ...]:
    """Per layer whether it has no RoPE; of length 0 for a family in which all have it."""
    if family.no_rope_every is None:
        return ()
    every, given = fields.size("no_rope_layer_interval", family.no_rope_every), fields.get("no_rope_layers")
    if given is None:
        return tuple((layer + 1) % every == 0 for layer in range(layers))
    if not isinstance(given, list) or len(given) != layers or any(has not in (0, 1) for has in given):
        raise fields.wrong("no_rope_layers", given, f"{layers} of 0 and 1, 1 for a layer with RoPE")
    return tuple(not has for has in given)


def _parameters(fields: Fields, family: Family, notices: list[str], local: bool) -> Mapping[str, Any]:
    older, newer = fields.get("rope_scaling"), fields.get("rope_parameters")
    if family.local_rope_theta is not None:
        nested = newer if isinstance(newer, dict) and newer.keys() & set(_NESTED) else {}
        if local:
            return _object(fields, nested.get("sliding_attention") or {})
        return _object(fields, nested.get("full_attention") or {}) | _object(fields, older or {})
    if older and newer and older != newer and not local:
        notices.append("config.json has 'rope_scaling' and 'rope_parameters': the former is used, the latter ignored")
    return _object(fields, older or newer or {})


def _object(fields: Fields, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"{fields.where}: RoPE scaling is {shown(value)}, expected an object")
    return value


def _turned(fields: Fields, inner: Fields, family: Family, head_dim: int) -> int | None:
    """Elements of a head that are turned; None for all."""
    if family.partial is None:
        return None
    share = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", family.partial))
    turned = int(head_dim * share)
    if turned % 2 or (head_dim - turned) % 2 or not 0 < turned <= head_dim:
        raise ModelError(
            f"{fields.where}: 'partial_rotary_factor' {share} turns {turned} of {head_dim} elements of a head; "
            "expected an even number"
        )
    return None if turned == head_dim else turned


def _of_kind(kind: str, theta: float, turned: int | None, head_dim: int, fields: Fields, inner: Fields) -> RopeSpec:
    if kind == "default":
        return RopeSpec(theta, turned=turned)
    longest = fields.size("max_position_embeddings")
    original = _original(kind, fields, inner, longest)
    factor = inner.number("factor", longest / original if kind in ("yarn", "longrope") else 1.0)
    if kind in ("linear", "dynamic"):
        return RopeSpec(theta, kind, factor, original_context=longest, turned=turned)  # type: ignore[arg-type]
    if kind == "llama3":
        low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
        return RopeSpec(theta, "llama3", factor, low, high, original, turned)
    if kind == "yarn":
        low, high = inner.number("beta_slow", 1.0), inner.number("beta_fast", 32.0)
        scale = inner.number("attention_factor", _yarn_scale(factor, inner))
        return RopeSpec(
            theta, "yarn", factor, low, high, original, turned, scale, whole_turns=inner.flag("truncate", True)
        )
    scale = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (_numbers(inner, name, (turned or head_dim) // 2) for name in ("short_factor", "long_factor"))
    scale = inner.number("attention_factor", scale)
    return RopeSpec(
        theta, "longrope", factor, original_context=original, turned=turned, scale=scale, short=short, long=long
    )


def _original(kind: str, fields: Fields, inner: Fields, longest: int) -> int:
    """Tokens that the model was trained for first; beside the other parameters it goes before that among them."""
    name = "original_max_position_embeddings"
    beside = fields.get(name)
    if beside is not None and kind in ("llama3", "yarn", "longrope"):
        return fields.size(name)
    found = inner.get(name)
    if isinstance(found, float) and found == int(found):
        return int(found)
    return inner.size(name, longest)


def _yarn_scale(factor: float, inner: Fields) -> float:
    def scale(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0

    mscale, all_dim = inner.number("mscale", 0.0, least=0.0), inner.number("mscale_all_dim", 0.0, least=0.0)
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _numbers(inner: Fields, name: str, count: int) -> tuple[float, ...]:
    found = inner.get(name)
    fits = isinstance(found, list) and len(found) == count
    if not fits or any(not isinstance(n, int | float) or isinstance(n, bool) or not 0 < n < 1e30 for n in found):
        raise inner.wrong(name, found, f"{count} numbers above 0")
    return tuple(float(n) for n in found)
