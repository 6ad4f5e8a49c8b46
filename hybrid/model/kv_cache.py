"""Keys and values of the tokens seen so far: a pool of blocks, and sequences that own or share them.

Blocks are as in PagedAttention (arXiv 2309.06180): a sequence's table says where each run of `block_size` tokens lies,
so that sequences grow without being moved, and a full block that two of them begin with is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hybrid.errors import ContextError
from placement.workspace import KV_BLOCK, SHARED_KV_BLOCK
from profiler.common.spec import ModelSpec

BLOCK_SIZE = KV_BLOCK  # tokens, where one sequence has the pool to itself
SHARED_BLOCK_SIZE = SHARED_KV_BLOCK  # where several share it
_TYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}


def check_context(spec: ModelSpec, tokens: int | None) -> int:
    """`tokens`, or the model's context for None. Raises `ContextError` when the model takes no such context."""
    tokens = spec.max_context if tokens is None else tokens
    if not 1 <= tokens <= spec.max_context:
        allowed = f"this model takes 1 to {spec.max_context} tokens"
        raise ContextError(f"context {tokens} is out of range: {allowed}", setting="context")
    return tokens


class KVPool:
    """Blocks of keys and values: `data` [n_layers, blocks, 2, n_kv_heads, block, head_dim], each counted as often as
    something refers to it. Used from one thread at a time.

    f32, f16 or int8 as the spec says (`kv_dtype`); in f16 they are clamped to what it can hold, int8 has `scales` f32
    [n_layers, blocks, 2, n_kv_heads, block], else None. All is reserved at once, but the system commits a page only
    when a token is written to it.
    """

    def __init__(self, spec: ModelSpec, tokens: int, block_size: int = SHARED_BLOCK_SIZE) -> None:
        """Room for `tokens` tokens in whole blocks. Raises `ContextError` when the machine does not give it."""
        blocks = -(-tokens // block_size)
        try:
            shape = spec.n_layers, blocks, 2, spec.n_kv_heads, block_size, spec.head_dim
            self.data = np.empty(shape, _TYPES[spec.kv_dtype])
            self.scales = np.empty(shape[:-1], np.float32) if spec.kv_dtype == "int8" else None
        except (MemoryError, ValueError) as error:  # NumPy raises the second beyond its own limits
            size = spec.n_layers * spec.kv_bytes_per_layer(tokens)
            raise ContextError(
                f"keys and values of {tokens} tokens take {size / 2**30:.1f} GiB, more than this machine gives; "
                "lower the context",
                setting="context",
            ) from error
        self.spec, self.block_size, self.blocks = spec, block_size, blocks
        self._references, self._free = [0] * blocks, list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nothing refers to."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many blocks, which the caller refers to now; those with the lowest ids that are free, or none where there
        are fewer."""
        if count > len(self._free):
            return []
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Refer to blocks that something refers to already."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Refer to them no more; those that nothing refers to are free. Raises `ValueError` for a free one."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"KV block {block} is free already")
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def references(self, block: int) -> int:
        """How many refer to it."""
        return self._references[block]


class KVCache:
    """One sequence's keys and values: `table` int32 holds its blocks in order, of which `length` tokens are written.

    `capacity`: tokens that it may have at most; the table is as long as those take. By itself it owns a pool for all of
    them at once; in a shared pool it `reserve`s blocks as it grows.
    """

    def __init__(self, spec: ModelSpec, capacity: int, pool: KVPool | None = None) -> None:
        """Raises `ContextError` when `capacity` is below 1 or beyond the model's context, or not to be had."""
        check_context(spec, capacity)
        self.capacity, self.length = capacity, 0
        self.pool = KVPool(spec, capacity, min(BLOCK_SIZE, capacity)) if pool is None else pool
        self.block_size = self.pool.block_size
        self._blocks: list[int] = []  # those that this sequence refers to
        self.table = np.zeros(-(-capacity // self.block_size), np.int32)
        if pool is None:
            self.reserve(capacity)

    @property
    def data(self) -> np.ndarray:
        """The pool's blocks."""
        return self.pool.data

    @property
    def scales(self) -> np.ndarray | None:
        """The pool's scales of int8."""
        return self.pool.scales

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that this sequence refers to, in order."""
        return tuple(self._blocks)

    def begin_with(self, blocks: Sequence[int]) -> None:
        """Begin an empty sequence with the tokens of full blocks, which it shares from now on."""
        if self._blocks:
            raise ValueError("only an empty sequence can begin with blocks of others")
        self.pool.share(blocks)
        self._blocks = list(blocks)
        self.table[: len(blocks)] = blocks
        self.length = len(blocks) * self.block_size

    def missing(self, tokens: int) -> int:
        """Blocks that it lacks to hold `tokens` tokens in all."""
        return max(0, -(-tokens // self.block_size) - len(self._blocks))

    def reserve(self, tokens: int) -> bool:
        """Have room for `tokens` tokens in all; False, and nothing is taken, where the pool has too few blocks.

        Raises `ContextError` beyond the capacity.
        """
        if tokens > self.capacity:
            raise ContextError(f"{tokens} tokens do not fit a context of {self.capacity}; shorten the prompt")
        count = self.missing(tokens)
        taken = self.pool.take(count)
        if len(taken) < count:
            return False
        self.table[len(self._blocks) : len(self._blocks) + count] = taken
        self._blocks += taken
        return True

    def reserve_or_raise(self, tokens: int) -> None:
        """`reserve`, or raise `ContextError` where the pool has too few blocks."""
        if not self.reserve(tokens):
            raise ContextError(f"{tokens} tokens of a sequence do not fit the KV blocks that are free; end another")

    def release(self) -> None:
        """Give all blocks back; the sequence is empty then."""
        self.pool.release(self._blocks)
        self._blocks, self.length = [], 0

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; their blocks stay reserved."""
        self.length = min(self.length, max(0, length))


class Row(NamedTuple):
    """One row of a step: the token that follows what `cache` holds, or what earlier rows of the same cache add."""

    cache: KVCache
    token: int
