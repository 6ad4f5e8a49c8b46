"""`StepBuffers`: the scratch of a decode step on the GPU, all of it out of the arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpu_kernels.contract import MAX_BATCH
from gpu_kernels.attention import AttentionScratch, attention_scratch, attention_splits
from gpu_kernels.sparse_ffn import down_parts
from hybrid.model.kv_cache import KVCache
from hybrid.model.transformer import Transformer
from hybrid.runtime.gpu.arena import DeviceArena

BATCHES = (8, 4, 2, 1)
WORKSPACE, ROPE = "workspace: decode", "workspace: RoPE tables"


@dataclass(frozen=True, eq=False)
class StepBuffers:
    """Scratch of all layers for up to `MAX_BATCH` tokens; f32 unless their name says otherwise.

    ahead: the FFN's input where it is that of attention, else `normed`; added: [2, t, d], what a norm follows before it
    joins the residual, of no size where none does; rotations: of each RoPE cosines and sines.
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
    positions: torch.Tensor
    table: torch.Tensor
    rotations: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    attention: dict[int, AttentionScratch]

    @classmethod
    def take(
        cls, arena: DeviceArena, model: Transformer, hot: torch.Tensor, zero_copy: int, cache: KVCache
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

        def scratch(tokens: int) -> AttentionScratch:
            splits = attention_splits(tokens, spec.n_kv_heads, cache.capacity)
            shaped = attention_scratch(tokens, spec.n_heads, spec.head_dim, splits, "meta")
            return AttentionScratch(*(floats(*t.shape) for t in (shaped.sums, shaped.maxima, shaped.totals)))

        normed = floats(MAX_BATCH, spec.d_model)
        return cls(
            x=floats(MAX_BATCH, spec.d_model),
            normed=normed,
            ahead=floats(MAX_BATCH, spec.d_model) if spec.parallel else normed,
            added=floats(2 * (spec.norms != "before"), MAX_BATCH, spec.d_model),
            qkv=floats(MAX_BATCH, heads * spec.head_dim),
            attended=floats(MAX_BATCH, spec.n_heads * spec.head_dim),
            units=floats(MAX_BATCH * rank),
            masks=arena.zeros(part, (f,), torch.uint8),
            spare=arena.zeros(part, (f,), torch.uint8),
            hot_ids=arena.zeros(part, (most_hot,), torch.int32),
            hot_masks=arena.zeros(part, (most_hot,), torch.uint8),
            hot_count=arena.zeros(part, (1,), torch.int32),
            zero_copy_ids=arena.zeros(part, (max(1, zero_copy),), torch.int32),
            zero_copy_masks=arena.zeros(part, (max(1, zero_copy),), torch.uint8),
            zero_copy_count=arena.zeros(part, (1,), torch.int32),
            every=arena.put(part, torch.arange(most_hot, dtype=torch.int32)),
            counts=arena.put(part, hot.to(torch.int32)),
            hidden=floats(MAX_BATCH * max(most_hot, zero_copy)),
            parts=floats(2 * down_parts(spec.d_model) * MAX_BATCH * spec.d_model),
            logits=floats(MAX_BATCH, spec.vocab_size),
            positions=arena.zeros(part, (MAX_BATCH,), torch.int32),
            table=arena.put(part, torch.from_numpy(cache.table)),
            rotations=rotations,
            attention={tokens: scratch(tokens) for tokens in BATCHES},
        )
