"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import numpy as np
import torch

from hybrid.errors import ContextError
from profiler.common.spec import ModelSpec

BLOCK_SIZE = 256


def check_context(spec: ModelSpec, tokens: int | None) -> int:
    """`tokens`, or the model's context for None. Raises `ContextError` when the model takes no such context."""
    tokens = spec.max_context if tokens is None else tokens
    if not 1 <= tokens <= spec.max_context:
        allowed = f"this model takes 1 to {spec.max_context} tokens"
        raise ContextError(f"context {tokens} is out of range: {allowed}", setting="context")
    return tokens


class KVCache:
    """Keys and values of one sequence in blocks of tokens: [n_layers, blocks, 2, n_kv_heads, block, head_dim].

    f32 or f16 as the spec says (`kv_element_bytes`); in f16 they are clamped to what it can hold.

    `table` int32 holds the sequence's blocks in order. The whole capacity is reserved at once, but the system commits a
    page only when a token is written to it.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        """Raises `ContextError` when `capacity` is below 1 or beyond the model's context."""
        check_context(spec, capacity)
        self.block_size = min(BLOCK_SIZE, capacity)
        blocks = -(-capacity // self.block_size)
        try:
            shape = spec.n_layers, blocks, 2, spec.n_kv_heads, self.block_size, spec.head_dim
            self.data = np.empty(shape, np.float32 if spec.kv_element_bytes == 4 else np.float16)
        except (MemoryError, ValueError) as error:  # NumPy raises the second beyond its own limits
            size = spec.n_layers * spec.kv_bytes_per_layer(capacity)
            raise ContextError(
                f"keys and values of {capacity} tokens take {size / 2**30:.1f} GiB, more than this machine gives; "
                "lower the context",
                setting="context",
            ) from error
        self.table = np.arange(blocks, dtype=np.int32)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [t, n_kv_heads, head_dim] after `length`; return all up to them, f32, heads first.

        `length` moves in `advance`, once every layer has appended. Raises `ContextError` when they do not fit.
        """
        end = self.length + keys.shape[0]
        if end > self.capacity:
            raise ContextError(f"{end} tokens do not fit a context of {self.capacity}; shorten the prompt")
        cache = torch.from_numpy(self.data[layer])
        if cache.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            keys, values = keys.clamp(-largest, largest), values.clamp(-largest, largest)
        at = self.length
        while at < end:
            block, first = divmod(at, self.block_size)
            count = min(end - at, self.block_size - first)
            new = slice(at - self.length, at - self.length + count)
            for side, source in enumerate((keys, values)):
                cache[block, side, :, first : first + count] = source[new].transpose(0, 1)
            at += count
        used = cache[: -(-end // self.block_size)].transpose(0, 2)  # [heads, 2, blocks, block, head_dim]
        return used[:, 0].flatten(1, 2)[:, :end].float(), used[:, 1].flatten(1, 2)[:, :end].float()

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.length = min(self.length, max(0, length))
