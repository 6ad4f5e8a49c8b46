"""Parts that a checkpoint holds in another form: which rows of a stored tensor they are, and what is done with these.

Every folding here is exact: rows are chosen and moved, and constants go into vectors, which are f32.

    fused       q, k and v, or gate and up, are rows of one tensor
    in part     of a head that RoPE turns in part, [r1 r2 p1 p2] with r the turned halves, rows of q and k come as
                [r1 p1 r2 p2]: what passes is then turned by 0, within whole heads
    other sign  of RoPE's sine: the halves of each head of q and k are swapped
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from profiler.common.spec import ModelSpec

Rows = Callable[[ModelSpec], tuple[int, np.ndarray]]  # rows of the stored tensor, and which of them, in order


@dataclass(frozen=True, eq=False)
class Stored:
    """Where a part lies: tensor `name` of `shape`, of which it is `rows` (None: all), times `times`, plus `plus`."""

    name: str
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    times: float = 1.0
    plus: float = 0.0

    @property
    def count(self) -> int:
        """Rows of the part."""
        return self.shape[0] if self.rows is None else len(self.rows)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part, of its stored tensor; a view where its rows lie together."""
        if self.rows is not None:
            together = self.together
            tensor = tensor[torch.from_numpy(self.rows)] if together is None else tensor[together]
        if self.times == 1.0 and self.plus == 0.0:
            return tensor
        return tensor.float() * self.times + self.plus

    @property
    def together(self) -> slice | None:
        """The rows as a slice where they are one."""
        rows = self.rows
        if rows is None:
            return slice(0, self.shape[0])
        is_run = len(rows) > 0 and bool((np.diff(rows) == 1).all())
        return slice(int(rows[0]), int(rows[-1]) + 1) if is_run else None


def part_of_three(part: str) -> Rows:
    """q, k or v of a tensor that holds one after another."""

    def rows(spec: ModelSpec) -> tuple[int, np.ndarray]:
        q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        first = {"q": 0, "k": q, "v": q + kv}[part]
        return q + 2 * kv, np.arange(first, first + (q if part == "q" else kv))

    return rows


def heads_of_three(part: str) -> Rows:
    """q, k or v of a tensor [heads, 3, head_dim]."""

    def rows(spec: ModelSpec) -> tuple[int, np.ndarray]:
        every = np.arange(3 * spec.n_heads * spec.head_dim).reshape(spec.n_heads, 3, spec.head_dim)
        return every.size, every[:, "qkv".index(part)].ravel()

    return rows


def heads_of_groups(part: str) -> Rows:
    """q, k or v of a tensor [kv_heads, heads / kv_heads + 2, head_dim]: each group's queries, its key, its value."""

    def rows(spec: ModelSpec) -> tuple[int, np.ndarray]:
        each = spec.n_heads // spec.n_kv_heads
        every = np.arange(spec.n_kv_heads * (each + 2) * spec.head_dim).reshape(spec.n_kv_heads, each + 2, -1)
        chosen = {"q": slice(0, each), "k": slice(each, each + 1), "v": slice(each + 1, None)}[part]
        return every.size, every[:, chosen].ravel()

    return rows


def first_half(spec: ModelSpec) -> tuple[int, np.ndarray]:
    """Of a tensor that holds gate and up."""
    return 2 * spec.d_ff, np.arange(spec.d_ff)


def second_half(spec: ModelSpec) -> tuple[int, np.ndarray]:
    """Of a tensor that holds gate and up."""
    return 2 * spec.d_ff, np.arange(spec.d_ff, 2 * spec.d_ff)


def turned_order(spec: ModelSpec, sine_turned: bool) -> np.ndarray | None:
    """The order of a head's elements in which all of it is turned, with the usual sign; None where it is so already."""
    turned, order = spec.rope and spec.rope.turned, np.arange(spec.head_dim)
    if turned:
        r1, r2, rest = *np.split(order[:turned], 2), order[turned:]
        p1, p2 = np.split(rest, 2)
        order = np.concatenate([r1, p1, r2, p2])
    if sine_turned:
        order = np.concatenate(np.split(order, 2)[::-1])
    return order if turned or sine_turned else None


def in_turned_order(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of whole heads, each head's in `order`."""
    return rows.reshape(-1, len(order))[:, order].ravel()
