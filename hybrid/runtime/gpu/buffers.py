"""`StepBuffers`: the scratch of a decode step on the GPU, all of it out of the arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_kernels.attention import AttentionScratch, attention_scratch, attention_splits
from gpu_kernels.sparse_ffn import down_parts
from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Transformer
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.rows import places_of, places_size
from placement.workspace import Workspace

WORKSPACE, ROPE = "workspace: decode", "workspace: RoPE tables"


@dataclass(frozen=True, eq=False)
class StepBuffers:
    """Scratch of all layers for up to `rows` rows, of which a step for t takes the first; f32 unless their name says
    otherwise.

    ahead: the FFN's input where it is that of attention, else `normed`; added: [2, t, d], what a norm follows before it
    joins the residual, of no size where none does; gemm: for products of 8 rows and more; places: of `places_of`;
    rotations: of each RoPE cosines and sines.
    """

    x: torch.Tensor
    normed: torch.Tensor
    ahead: torch.Tensor
    added: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    units: torch.Tensor
    masks: torch.Tensor
    spare: torch.Tensor
    hot_ids: torch.Tensor
    hot_masks: torch.Tensor
    hot_count: torch.Tensor
    zero_copy_ids: torch.Tensor
    zero_copy_masks: torch.Tensor
    zero_copy_count: torch.Tensor
    every: torch.Tensor
    counts: torch.Tensor
    hidden: torch.Tensor
    parts: torch.Tensor
    logits: torch.Tensor
    places: torch.Tensor
    blocks: int
    rotations: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    splits: AttentionScratch
    gemm: torch.Tensor

    def where(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions int32 [size] and tables int32 [size, blocks] of a step."""
        return places_of(self.places, size, self.blocks)

    def attention(self, size: int) -> AttentionScratch:
        """Scratch of a step's attention."""
        return AttentionScratch(self.splits.sums[:size], self.splits.maxima[:size], self.splits.totals[:size])

    @classmethod
    def take(
        cls, arena: DeviceArena, model: Transformer, hot: torch.Tensor, zero_copy: int, cache: KVCache, rows: int
    ) -> StepBuffers:
        spec, part = model.spec, WORKSPACE
        heads = spec.n_heads + 2 * spec.n_kv_heads
        most_hot, f = max(1, int(hot.max())), spec.d_ff
        rank = max((len(ffn.predictor.b1) for ffn in model.ffns if ffn.predictor is not None), default=1)
        rotations = tuple(
            (arena.put(ROPE, cos.contiguous()), arena.put(ROPE, sin.contiguous()))
            for cos, sin in model.step_rotations(cache.capacity)
        )

        def floats(*shape: int) -> torch.Tensor:
            return arena.zeros(part, shape)

        def ints(*shape: int) -> torch.Tensor:
            return arena.zeros(part, shape, torch.int32)

        splits = attention_splits(spec.n_kv_heads, cache.capacity)
        shaped = attention_scratch(rows, spec.n_heads, spec.head_dim, splits, "meta")
        normed = floats(rows, spec.d_model)
        return cls(
            x=floats(rows, spec.d_model),
            normed=normed,
            ahead=floats(rows, spec.d_model) if spec.parallel else normed,
            added=floats(2 * (spec.norms != "before"), rows, spec.d_model),
            qkv=floats(rows, heads * spec.head_dim),
            attended=floats(rows, spec.n_heads * spec.head_dim),
            units=floats(rows * rank),
            masks=ints(f),
            spare=ints(f),
            hot_ids=ints(most_hot),
            hot_masks=ints(most_hot),
            hot_count=ints(1),
            zero_copy_ids=ints(max(1, zero_copy)),
            zero_copy_masks=ints(max(1, zero_copy)),
            zero_copy_count=ints(1),
            every=arena.put(part, torch.arange(most_hot, dtype=torch.int32)),
            counts=arena.put(part, hot.to(torch.int32)),
            hidden=floats(rows * max(most_hot, zero_copy)),
            parts=floats(2 * down_parts(spec.d_model) * rows * spec.d_model),
            logits=floats(rows, spec.vocab_size),
            places=ints(places_size(rows, len(cache.table))),
            blocks=len(cache.table),
            rotations=rotations,
            splits=AttentionScratch(*(floats(*t.shape) for t in (shaped.sums, shaped.maxima, shaped.totals))),
            gemm=floats(Workspace(spec, cache.capacity, 0, 1, rows).gemm_floats),
        )
