"""Rotary position embedding: the angles by which pairs of a head's elements are turned (arXiv 2104.09864).

With i the pair, r the elements that are turned and theta the base, a pair turns by theta^(-2 i / r) a position, and

    linear     by 1 / factor of that
    llama3     long wavelengths by 1 / factor, short ones as they are, those between blended
    yarn       the same, blended over pairs, by numbers of turns in the original context (arXiv 2309.00071)
    dynamic    by a base that grows with the text, once that is longer than the original context
    longrope   by 1 / short[i], or 1 / long[i] once the text is longer than the original context (arXiv 2402.13753)
    none       not at all

A head that is turned in part has its turned halves first in each half (see `hybrid.formats.tensors`), and pairs that
turn by 0. Cosines and sines of turned pairs are multiplied with yarn's and longrope's `scale`, all of them with the
root of what attention's scores are to be multiplied with, beside one over the root of the head's size: `score_scale`.
"""

from __future__ import annotations

import math

import torch

from profiler.common.spec import RopeSpec

Rotation = tuple[torch.Tensor, torch.Tensor]


def rope_frequencies(rope: RopeSpec, head_dim: int, length: int = 1) -> torch.Tensor:
    """Angles per position of each pair, [head_dim / 2] f32, in a text of `length` tokens."""
    turned, found = _turned_elements(rope, head_dim), torch.zeros(head_dim // 2)
    if turned:
        found[: turned // 2] = _frequencies(rope, turned, length)
    return found


def rotation(rope: RopeSpec, head_dim: int, positions: torch.Tensor, length: int) -> Rotation:
    """Cosines and sines [t, head_dim / 2] f32 of `positions` in a text of `length` tokens."""
    return _turned(rope, torch.outer(positions.float(), rope_frequencies(rope, head_dim, length)))


def step_rotation(rope: RopeSpec, head_dim: int, capacity: int) -> Rotation:
    """Cosines and sines [capacity, head_dim / 2] f32 of a step's token: at each position the text ends there."""
    if not rope.follows_length:
        return rotation(rope, head_dim, torch.arange(capacity), capacity)
    known = min(capacity, rope.original_context)
    rows = [rope_frequencies(rope, head_dim, known).expand(known, -1)]
    if rope.kind == "longrope":
        rows.append(rope_frequencies(rope, head_dim, known + 1).expand(capacity - known, -1))
    else:
        rows += [rope_frequencies(rope, head_dim, length)[None] for length in range(known + 1, capacity + 1)]
    return _turned(rope, torch.arange(capacity).float()[:, None] * torch.cat(rows))


def _turned(rope: RopeSpec, angles: torch.Tensor) -> Rotation:
    scales = torch.full((angles.shape[-1],), math.sqrt(rope.score_scale))
    scales[: _turned_elements(rope, 2 * len(scales)) // 2] *= rope.scale
    return angles.cos() * scales, angles.sin() * scales


def _turned_elements(rope: RopeSpec, head_dim: int) -> int:
    return 0 if rope.kind == "none" else rope.turned or head_dim


def _frequencies(rope: RopeSpec, turned: int, length: int) -> torch.Tensor:
    exponents = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
    theta = rope.theta
    if rope.kind == "dynamic" and length > rope.original_context:
        grown = rope.factor * length / rope.original_context - (rope.factor - 1)
        theta *= grown ** (turned / (turned - 2))
    if rope.kind == "longrope":
        factors = rope.long if length > rope.original_context else rope.short
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * theta**exponents)
    base = 1.0 / theta**exponents
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    return _yarn(rope, base, turned) if rope.kind == "yarn" else base


def _llama3(rope: RopeSpec, base: torch.Tensor) -> torch.Tensor:
    wavelength = 2 * math.pi / base
    low, high = rope.original_context / rope.low, rope.original_context / rope.high
    blend = (rope.original_context / wavelength - rope.low) / (rope.high - rope.low)
    blended = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(wavelength > low, base / rope.factor, base)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def _yarn(rope: RopeSpec, base: torch.Tensor, turned: int) -> torch.Tensor:
    def pair(turns: float) -> float:
        """The pair that turns so many times in the original context."""
        return turned * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.high), pair(rope.low)
    if rope.whole_turns:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, turned - 1)
    slow = ((torch.arange(turned // 2).float() - first) / ((last - first) or 0.001)).clamp(0, 1)
    return base / rope.factor * slow + base * (1 - slow)
