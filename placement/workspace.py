"""Scratch on the GPU that all layers share: what there is of it and how large, for the plan and for the runtime alike.

Names and bytes come from here alone, so that the runtime takes what the plan says. Everything is f32 or int32 but for
what is sorted to choose a token (int64). Each buffer is rounded up to the allocator's granularity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from cpu_kernels.contract import LAYOUTS, MAX_BATCH, padded
from profiler.common.spec import ModelSpec

ALIGNMENT = 512  # the CUDA allocator hands out multiples of this
BATCHES = (1, 2, 4, 8, 16, 32)  # rows of a decode step: there is a CUDA graph for each up to the most planned for
ENGINE_ROWS, SERVER_ROWS = 8, 32  # the most of an engine for one answer, and where many are given at once
KV_BLOCK, SHARED_KV_BLOCK = 256, 32  # tokens of a block of KV: of one sequence's cache, and where several share a pool
STAGING_LIMIT = 64 * 2**20  # bytes of one staging buffer: beyond it PCIe is not faster
STAGING_SHARE = 4  # a staging buffer holds a layer's cold neurons in at most so many parts, unless it is at its limit
# Loaded kernels, CUDA graphs and what torch and cuBLAS take for themselves, once a process, beside the CUDA context:
# 174 to 185 MiB on an H200 with prompts of 2048 tokens, at budgets from 2 GiB on, and 276 where `hybrid bench` measured
# bandwidths in the same process. The rest is for other drivers and shapes.
RUNTIME_RESERVE = 304 * 2**20
PREFILL_CHUNK = 2048  # tokens of a prompt that go through the layers at once
PREFILL_WIDE = 512  # of those, for which QKV and hidden values are computed at once
PREFILL_COLUMNS = 4096  # neurons of an FFN computed at once, up to a third of them, and half of other products' columns
_GEMM_ALIGNED = 64  # f32 elements that parts of its scratch are a multiple of
_TERMS = 3  # in which f32 rows are split for 16-bit products of a decode step

# Of `gpu_kernels.attention`, `sparse_ffn`, `sampling`, `row_gemm` and `row_ffn`, which need triton, as a plan must not.
_SPLIT_PROGRAMS, _SPLIT_KEYS, _MOST_SPLITS = 528, 64, 128
_DOWN_PROGRAMS, _DOWN_COLUMNS, _MOST_PARTS = 264, 64, 64
_SAMPLED, _SAMPLING_BLOCK = 1024, 2048
_GEMM_KINDS, _GEMM_ROWS, _GEMM_TILE, _GEMM_PROGRAMS, _MOST_GEMM_PARTS = ("bf16", "f16"), 8, 64, 400, 4
_FFN_PARTS = 4

Bytes = TypeVar("Bytes", int, np.ndarray)


def aligned(size: Bytes) -> Bytes:
    """`size` rounded up to the allocator's granularity, for a number or an array of bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def attention_splits(kv_heads: int, capacity: int) -> int:
    """As `gpu_kernels.attention.attention_splits`."""
    return max(1, min(_SPLIT_PROGRAMS // kv_heads, capacity // _SPLIT_KEYS, _MOST_SPLITS))


def down_parts(d: int) -> int:
    """As `gpu_kernels.sparse_ffn.down_parts`."""
    return max(1, min(_MOST_PARTS, _DOWN_PROGRAMS // -(-d // _DOWN_COLUMNS)))


def gemm_floats(rows: int, n: int, d: int) -> int:
    """As `gpu_kernels.row_gemm.gemm_floats`."""
    parts = max(1, min(_MOST_GEMM_PARTS, _GEMM_PROGRAMS // -(-n // _GEMM_TILE)))
    return rows + _TERMS * rows * d // 2 + rows * n * parts * (parts > 1)


def ffn_floats(rows: int, capacity: int, d: int, gated: bool) -> int:
    """As `gpu_kernels.row_ffn.ffn_floats`."""
    width = -(-capacity // _GEMM_TILE) * _GEMM_TILE
    return rows + _TERMS * rows * (d + width) // 2 + _FFN_PARTS * (1 + gated) * rows * width


def cached_tokens(context: int, block: int = KV_BLOCK) -> int:
    """Tokens that a sequence of `context` tokens has room for: whole blocks, or of one sequence's cache one smaller."""
    block = min(block, context) if block == KV_BLOCK else block
    return -(-context // block) * block


class GemmSizes(NamedTuple):
    """Scratch of `hybrid.runtime.gpu.gemm`.

    tokens: the most at once; width: the most columns of what is multiplied; columns: of products of two terms twice so
    many at once, which are a matrix's or those of gate and up; of three a third less; in_blocks: whether weights are
    widened, as many as half of `columns` rows have to f32, or all to f16.
    """

    tokens: int
    width: int
    columns: int
    in_blocks: bool

    @property
    def parts(self) -> tuple[int, ...]:
        """f32 elements: scales, three 16-bit terms of tokens, as many of hidden values, products, widened weights."""
        tokens, columns = self.tokens, self.columns
        terms, widened = (3 * tokens + 1) // 2, -(-columns // 2) * self.width * self.in_blocks
        sizes = (2 * tokens, terms * self.width, terms * columns, 4 * tokens * columns, widened)
        return tuple(-(-size // _GEMM_ALIGNED) * _GEMM_ALIGNED for size in sizes)


@dataclass(frozen=True)
class Workspace:
    """Scratch of a model `spec` with sequences of up to `context` tokens, in bytes by buffer.

    rank: hidden units of the largest predictor, 0 without predictors. prefill_chunk: the most tokens of a prompt that
    go through the layers at once. batch: of `BATCHES`, the most rows of a decode step. block: tokens of a block of KV.
    """

    spec: ModelSpec
    context: int
    rank: int
    prefill_chunk: int
    batch: int
    block: int = KV_BLOCK

    @property
    def decode(self) -> dict[str, int]:
        """Buffers of a decode step of `batch` rows."""
        spec, rows = self.spec, self.batch
        queries, both = spec.n_heads * spec.head_dim, 2 * spec.n_kv_heads * spec.head_dim
        vectors = {
            "x": spec.d_model,
            "normed": spec.d_model,
            "ahead": spec.d_model * spec.parallel,
            "added": 2 * spec.d_model * (spec.norms != "before"),
            "qkv": queries + both,
            "attended": queries,
            "predictor hidden": self.rank,
            "hidden": spec.d_ff,
            "parts": 2 * down_parts(spec.d_model) * spec.d_model,  # of hot neurons, and of those read over PCIe
            "logits": spec.vocab_size,
        }
        slots = rows * spec.n_heads * attention_splits(spec.n_kv_heads, self.context)
        return {name: aligned(4 * rows * width) for name, width in vectors.items()} | {
            "attention splits": aligned(4 * slots * spec.head_dim) + 2 * aligned(4 * slots),
            # Masks of all neurons, of the hot ones and those read over PCIe among the predicted, and spare ones.
            "masks": 4 * aligned(4 * spec.d_ff),
            "ids": 3 * aligned(4 * spec.d_ff),  # of both kinds predicted, and of all
            "sampling": self._sampling,
            "row gemm": aligned(4 * self.gemm_floats),
            # Positions and block tables, counts by layer; tokens, settings of the sampler, the mailbox's state.
            "control": aligned(4 * (MAX_BATCH + rows * self.blocks)) + aligned(4 * spec.n_layers) + 16 * ALIGNMENT,
        }

    @property
    def blocks(self) -> int:
        """Entries of a sequence's block table."""
        return -(-self.context // self.block)

    @property
    def gemm_floats(self) -> int:
        """f32 elements of scratch for products of many rows with QKV, output, FFN and head; 0 where there are none."""
        spec, rows = self.spec, self.batch
        queries, both = spec.n_heads * spec.head_dim, 2 * spec.n_kv_heads * spec.head_dim
        layers, head = spec.dtype in _GEMM_KINDS, (spec.embedding_dtype or spec.dtype) in _GEMM_KINDS
        shapes = [(queries + both, spec.d_model), (spec.d_model, queries)] * layers
        shapes += [(spec.vocab_size, spec.d_model)] * head
        if rows < _GEMM_ROWS or not shapes:
            return 0
        ffn = ffn_floats(rows, spec.d_ff, spec.d_model, spec.gated) if spec.dtype == "bf16" else 0
        return max(ffn, *(gemm_floats(rows, n, d) for n, d in shapes))

    @property
    def _sampling(self) -> int:
        """The best of each block of logits, the largest ones, and what is sorted for them, which keeps at most a
        quarter of the vocabulary, and then a quarter of that."""
        vocab = self.spec.vocab_size
        best, largest = self.batch * -(-vocab // _SAMPLING_BLOCK), self.batch * min(_SAMPLED, vocab)
        keys = self.batch * min(4 * vocab, 5 * vocab // 16 + 2048)
        return 2 * aligned(4 * best) + 2 * aligned(4 * largest) + aligned(8 * keys)

    @property
    def norms(self) -> int:
        """The norm that each layer begins with, wherever that is, and the final norm: what follows an FFN's sum."""
        return (1 if self.spec.norms == "after" else self.spec.n_layers + 1) * self.norm_bytes

    @property
    def norm_bytes(self) -> int:
        """One norm's f32 vectors."""
        return (1 if self.spec.norm == "rms" else 2) * aligned(4 * self.spec.d_model)

    @property
    def rope(self) -> int:
        """Cosines and sines f32 [context, head_dim / 2] of each RoPE."""
        ropes = (self.spec.rope is not None) + (self.spec.other_rope is not None)
        return 2 * ropes * aligned(4 * self.context * -(-self.spec.head_dim // 2))

    @property
    def prefill(self) -> dict[str, int]:
        """Buffers of a chunk of a prompt: its vectors, those of `PREFILL_WIDE` of its tokens, and scratch of products,
        for inputs and weights."""
        spec, chunk = self.spec, min(self.prefill_chunk, self.context)
        queries, both, wide = (
            spec.n_heads * spec.head_dim,
            2 * spec.n_kv_heads * spec.head_dim,
            min(PREFILL_WIDE, chunk),
        )
        return {
            "x": aligned(4 * chunk * spec.d_model),
            "normed": aligned(4 * chunk * spec.d_model),
            "ahead": aligned(4 * chunk * spec.d_model * spec.parallel),
            "added": aligned(4 * chunk * spec.d_model * (spec.norms != "before")),
            "rotations": self.rope if self.spec.rope and self.spec.rope.follows_length else 0,
            "positions": aligned(4 * chunk),
            "qkv": aligned(4 * wide * (queries + both)),
            "attended": aligned(4 * wide * queries),
            "scratch": aligned(4 * sum(self.prefill_gemm.parts)),
            "table": aligned(4 * self.blocks),
        }

    @property
    def prefill_gemm(self) -> GemmSizes:
        """Products of a prompt's tokens."""
        spec = self.spec
        queries = spec.n_heads * spec.head_dim
        third = -(-spec.d_ff // (3 * _GEMM_ALIGNED)) * _GEMM_ALIGNED
        tokens = min(PREFILL_WIDE, self.prefill_chunk, self.context)
        return GemmSizes(tokens, max(spec.d_model, queries), min(PREFILL_COLUMNS, third), LAYOUTS[spec.dtype].in_blocks)

    @property
    def staging_neurons(self) -> int:
        """Cold neurons that one staging buffer takes: a quarter of a layer, or what 64 MiB hold, and at least one."""
        fits = (STAGING_LIMIT - 5 * ALIGNMENT) // self.spec.neuron_bytes
        return max(1, min(-(-self.spec.d_ff // STAGING_SHARE), fits))

    @property
    def staging_bytes(self) -> int:
        """One of the two staging buffers: gate, up and down rows and biases of its neurons, each aligned."""
        return neurons_bytes(self.spec, self.staging_neurons)

    def rows(self) -> list[tuple[str, int]]:
        """All of it as (name, bytes)."""
        return [
            ("workspace: decode", sum(self.decode.values())),
            ("workspace: norms", self.norms),
            ("workspace: RoPE tables", self.rope),
            ("workspace: prefill", sum(self.prefill.values())),
            ("workspace: staging", 2 * self.staging_bytes),
        ]


def neurons_bytes(spec: ModelSpec, count: Bytes) -> Bytes:
    """Bytes of `count` neurons on the GPU, elementwise: their rows of each matrix one tensor, f32 biases one each."""
    biases = (spec.rows_per_neuron - 1) * spec.ffn_bias
    return spec.rows_per_neuron * aligned(count * spec.row_bytes(spec.d_model)) + biases * aligned(4 * count)


def layer_bytes(spec: ModelSpec) -> int:
    """Bytes of a layer's dense tensors on the GPU: projections as they are stored, the FFN's norm and biases f32."""
    d, queries, both = spec.d_model, spec.n_heads * spec.head_dim, 2 * spec.n_kv_heads * spec.head_dim
    vectors = [d] * (1 if spec.norm == "rms" else 2) * {"before": 1, "after": 2, "both": 3}[spec.norms]
    vectors += [queries + both] * spec.qkv_bias + [d] * spec.out_bias + [d] * spec.ffn_bias
    vectors += [spec.q_norm_size, spec.k_norm_size] * (2 if spec.qk_norm == "head layer" else 1)
    matrices = aligned((queries + both) * spec.row_bytes(d)) + aligned(d * spec.row_bytes(queries))
    return matrices + sum(aligned(4 * width) for width in vectors)


def copy_bytes(spec: ModelSpec) -> int:
    """Bytes of a layer's certificate on the GPU: int8 copies of the rows that decide, two bounds and, where there are
    biases, theirs, f32."""
    rows = aligned(spec.d_ff * LAYOUTS["int8"].row_bytes(spec.d_model))
    return rows + (2 + spec.ffn_bias) * aligned(4 * spec.d_ff)


def proxy_bytes(spec: ModelSpec) -> int:
    """Bytes of a layer's proxy on the GPU: int4 copies of gate and up, lengths of the rows of down and, where there are
    biases, theirs, f32."""
    matrices = spec.rows_per_neuron - 1
    rows = matrices * aligned(spec.d_ff * LAYOUTS["int4"].row_bytes(spec.d_model))
    return rows + (1 + matrices * spec.ffn_bias) * aligned(4 * spec.d_ff)


def predictor_bytes(d_model: int, d_ff: int, rank: int) -> int:
    """Bytes of a predictor on the GPU: int8 codes in rows padded to 128, scales and biases f32; 0 for rank 0."""
    if not rank:
        return 0
    codes = aligned(rank * padded(d_model)) + aligned(d_ff * padded(rank))
    return codes + 2 * aligned(4 * rank) + 2 * aligned(4 * d_ff)
