"""`PrefillBuffers`: the scratch of prefill on the GPU, all of it out of the arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Transformer
from hybrid.runtime.gpu.arena import DeviceArena
from placement.workspace import GemmSizes

PART = "workspace: prefill"


@dataclass(frozen=True, eq=False)
class PrefillBuffers:
    """Scratch of all layers; f32 unless their name says otherwise; x to added for the tokens of a chunk, the rest for
    those at once.

    rotations: cosines, then sines [capacity, head_dim / 2] of a RoPE that depends on how long the text is.
    """

    x: torch.Tensor
    normed: torch.Tensor
    ahead: torch.Tensor
    added: torch.Tensor
    rotations: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    scratch: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor

    @classmethod
    def take(
        cls, arena: DeviceArena, model: Transformer, cache: KVCache, chunk: int, gemm: GemmSizes
    ) -> PrefillBuffers:
        """chunk: tokens that go through the layers at once; gemm: what is wide is computed for so many of those."""
        spec = model.spec
        queries, both = spec.n_heads * spec.head_dim, 2 * spec.n_kv_heads * spec.head_dim
        blocks = len(cache.table)
        wide = gemm.tokens

        def floats(*shape: int) -> torch.Tensor:
            return arena.empty(PART, shape)

        normed, following = floats(chunk, spec.d_model), any(rope.follows_length for rope in model.ropes)
        return cls(
            x=floats(chunk, spec.d_model),
            normed=normed,
            ahead=floats(chunk, spec.d_model) if spec.parallel else normed,
            added=floats(chunk if spec.norms != "before" else 0, spec.d_model),
            rotations=floats(2 * cache.capacity * following, spec.head_dim // 2),
            qkv=floats(wide, queries + both),
            attended=floats(wide, queries),
            scratch=floats(sum(gemm.parts)),
            positions=arena.empty(PART, (chunk,), torch.int32),
            table=arena.empty(PART, (blocks,), torch.int32),
        )
