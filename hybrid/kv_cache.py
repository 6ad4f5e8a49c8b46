"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import torch

from hybrid.errors import ContextError
from profiler.spec import ModelSpec


class KVCache:
    """Keys and values of one sequence: per layer [n_kv_heads, capacity, head_dim] f32.

    The whole capacity is reserved at once, but the system commits a page only when a token is written to it.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        """Raises `ContextError` when `capacity` is below 1 or beyond the model's context."""
        if not 1 <= capacity <= spec.max_context:
            raise ContextError(
                f"context {capacity} is out of range: this model takes 1 to {spec.max_context} tokens; lower --context"
            )
        shape = (spec.n_layers, 2, spec.n_kv_heads, capacity, spec.head_dim)
        try:
            self._data = torch.empty(shape, dtype=torch.float32)
        except RuntimeError as error:  # torch's way to say that the system has no such memory
            size = spec.n_layers * spec.kv_bytes_per_layer(capacity)
            raise ContextError(
                f"keys and values of {capacity} tokens take {size / 2**30:.1f} GiB, more than this machine gives; "
                "lower --context"
            ) from error
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [t, n_kv_heads, head_dim] after `length`; return all up to them, heads first.

        `length` moves in `advance`, once every layer has appended. Raises `ContextError` when they do not fit.
        """
        end = self.length + keys.shape[0]
        if end > self.capacity:
            raise ContextError(f"{end} tokens do not fit a context of {self.capacity}; shorten the prompt")
        cache = self._data[layer]
        cache[0, :, self.length : end] = keys.transpose(0, 1)
        cache[1, :, self.length : end] = values.transpose(0, 1)
        return cache[0, :, :end], cache[1, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.length = min(self.length, max(0, length))
