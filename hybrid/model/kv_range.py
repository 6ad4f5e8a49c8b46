"""What keys and values a model's weights can give, and whether f16 holds them.

A norm leaves an input x of |x| at most sqrt(d), times its weights g, plus its bias c. With a row w of k or v and its
bias b, an element w . (g x + c) + b is thus at most sqrt(d) |w g| + |w . c + b|, and |w g| or the latter is its usual
size. RoPE turns two elements into each other; a norm of keys leaves them at most sqrt(head_dim), times its weights.

f16 holds numbers up to 65504, and below 2^-14 fewer and fewer digits of them. Nearly every model stays so far within
both that the largest weight and a row of each head show it, at the speed of memory; else all rows are read.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch

from hybrid.model.reader import CheckpointReader
from profiler.common.spec import ModelSpec

_LARGEST_F16 = 65504.0
_LEAST_F16 = 2.0**-14


class _Inputs(NamedTuple):
    """What a layer's norm makes of its inputs: times `scale`, plus `shift`, f32 [d]."""

    scale: torch.Tensor
    shift: torch.Tensor | None


def needs_wide_kv(spec: ModelSpec, reader: CheckpointReader) -> bool:
    """Whether some key or value can be beyond f16, or all of some head are usually below it.

    Raises `ModelError` when weights that they come from are infinite or NaN.
    """
    return not all(_layer_fits(spec, reader, layer) for layer in range(spec.n_layers))


def _layer_fits(spec: ModelSpec, reader: CheckpointReader, layer: int) -> bool:
    scale, shift = (reader.finite("attention_norm", layer, kind) for kind in ("weight", "bias"))
    if scale is None:  # without a norm before them, what they can reach is not known
        return False
    inputs, turned = _Inputs(scale, shift), _turning(spec)
    normed, offset = (reader.finite("k_norm", layer, kind) for kind in ("weight", "bias"))
    if normed is None:
        keys_fit = _fits(spec, reader, layer, "k", inputs, turned)
    else:
        sizes, most = normed.abs(), 0.0 if offset is None else float(offset.abs().max())
        most += math.sqrt(len(normed)) * float(sizes.max())
        keys_fit = _holds(turned * most, turned * sizes.amax(0, keepdim=True))
    return keys_fit and _fits(spec, reader, layer, "v", inputs, 1.0)


def _turning(spec: ModelSpec) -> float:
    """By how much RoPE may lengthen an element of a key."""
    ropes = [rope for rope in (spec.rope, spec.other_rope) if rope is not None]
    return max((math.sqrt(2 * rope.score_scale) * rope.scale for rope in ropes), default=1.0)


def _fits(
    spec: ModelSpec, reader: CheckpointReader, layer: int, part: Literal["k", "v"], inputs: _Inputs, factor: float
) -> bool:
    """Whether f16 holds what k or v give, times `factor`."""
    heads = (spec.n_kv_heads, spec.head_dim)
    largest, bias = reader.largest(part, layer), reader.finite(part, layer, "bias")
    most = largest * math.sqrt(spec.d_model) * float(inputs.scale.norm())
    most += 0.0 if inputs.shift is None else largest * float(inputs.shift.abs().sum())
    most += 0.0 if bias is None else float(bias.abs().max())
    bias = torch.zeros(heads) if bias is None else bias.view(heads)
    first = reader.rows(part, layer, np.arange(0, heads[0] * heads[1], heads[1]))[:, None]
    usual = torch.hypot(*_sizes(first, bias[:, :1], inputs)).amax(1)
    if bool(usual.all()) and _holds(factor * most, usual):
        return True
    rows = reader.tensor(part, layer).unflatten(0, heads)
    spread, offset = _sizes(rows, bias, inputs)
    most = float((math.sqrt(spec.d_model) * spread + offset).max())
    return _holds(factor * most, torch.hypot(spread, offset).amax(1))


def _sizes(rows: torch.Tensor, bias: torch.Tensor, inputs: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """|w g| and |w . c + b| of rows [heads, n, d] and biases [heads, n], each f32 [heads, n]."""
    wide = rows.float()
    offset = bias if inputs.shift is None else bias + wide @ inputs.shift
    return torch.linalg.vector_norm(wide * inputs.scale, dim=-1), offset.abs()


def _holds(most: float, usual: torch.Tensor) -> bool:
    """Whether f16 holds numbers up to `most`, and each of `usual` sizes that is not 0."""
    return most <= _LARGEST_F16 and not bool(((usual > 0) & (usual < _LEAST_F16)).any())
