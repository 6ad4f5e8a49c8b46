"""`CpuStep`: one token of a model through the compiled step, by the weights, KV cache and threads of its engine."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from cpu_kernels.addresses import address_table
from cpu_kernels.certificate import CertificateView
from cpu_kernels.contract import GROUP, MAX_BATCH, activation_word
from cpu_kernels.decode_buffers import (
    CERTIFIED,
    DENSE,
    EXACT,
    LEARNED,
    PROXY,
    Column,
    Count,
    Ends,
    Number,
    Phase,
    Shape,
    Shared,
    new_numbers,
    new_own,
    new_shared,
)
from cpu_kernels.decode_step import decode_step
from cpu_kernels.lanes import stored_view
from cpu_kernels.low_rank import PredictorView
from cpu_kernels.proxy import ProxyView
from cpu_kernels.worker_pool import Each
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.transformer import Block, Norm, Transformer
from profiler.common.spec import Strategy

_STRATEGIES: dict[Strategy, int] = {
    "dense": DENSE, "exact": EXACT, "learned": LEARNED, "certified": CERTIFIED, "proxy": PROXY
}  # fmt: skip
# Where a layer's row has the address of what the strategy names neurons by.
_NAMED_BY = {"learned": Column.FC1, "certified": Column.COPY_SLOPE, "proxy": Column.COPY_UP}


class StepArguments(NamedTuple):
    """Arguments of `decode_step` and `serve` that come of the model."""

    likes: tuple[np.ndarray, ...]
    table: np.ndarray
    shape: Shape
    eps: float
    rotation: tuple[np.ndarray, np.ndarray]
    shared: Shared
    owns: Each


class CpuStep:
    """What `decode_step` needs, made once: the table of addresses and every buffer.

    It holds the model and the cache, whose arrays the addresses point into; neither may be replaced while it lives.
    """

    def __init__(self, model: Transformer, cache: KVCache, runtime: FFNRuntime) -> None:
        self._model, self._cache, self._runtime = model, cache, runtime
        self._kept: list[np.ndarray] = []  # vectors that only the table points to
        spec, predictors = model.spec, [ffn.predictor for ffn in model.ffns]
        rank = max((len(p.b1) for p in predictors if p is not None), default=0)
        self._shape = Shape(
            d=spec.d_model,
            f=spec.d_ff,
            heads=spec.n_heads,
            kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            vocab=spec.vocab_size,
            blocks=cache.data.shape[1],
            block_size=cache.block_size,
            layer_norm=int(spec.norm == "layer"),
            activation=activation_word(spec.activation),
            strategy=DENSE,
            parallel=int(spec.parallel),
            all_heads_normed=int(spec.qk_norm == "all"),
        )
        workers = runtime.pool.threads
        self._shared = new_shared(self._shape, rank, workers, len(cache.table))
        self._owns = Each(new_own(self._shape, rank) for _ in range(workers))
        self._table = np.array([*(self._layer(n, block) for n, block in enumerate(model.blocks)), self._ends()])
        attention, ffn = model.blocks[0].attention.qkv.matrix, model.ffns[0].up
        matrices = (attention, ffn, model.head.matrix, model.embedding)
        keys, codes = stored_view(cache.data[0, 0, 0, 0, 0]), np.empty((1, GROUP), np.int8)
        self._likes = (*(matrix.like for matrix in matrices), keys, codes)
        self._logits = torch.from_numpy(self._shared.logits)
        self._rotation = self._angles(cache.capacity)
        self._numbers = new_numbers(self._shape, float(spec.norm_eps), float(spec.embedding_scale))
        self._shared_table = address_table((self._rotation, self._shared))
        self._own_tables = Each(address_table(own) for own in self._owns)

    def run(self, token: int, strategy: Strategy) -> torch.Tensor:
        """Logits [vocab] f32 after `token`, which joins the step's own sequence; see `rows`."""
        return self.rows([Row(self._cache, token)], strategy)[0]

    def rows(self, rows: Sequence[Row], strategy: Strategy, first: int = 0) -> torch.Tensor:
        """Logits [rows - first, vocab] f32 after one more token of each of up to 32 rows, which join their sequences;
        counts and times go to the runtime's counters. The logits are a buffer that the next call overwrites.

        first: rows before it get no logits.
        """
        self._require(strategy)
        self._shared.ticks[:], self._shared.tallies[:] = 0, 0
        self.place(rows)
        start, count = perf_counter(), len(rows)
        self._run(self._table, self._shape._replace(strategy=_STRATEGIES[strategy]), count, first)
        logits = self._model.capped(self._logits[: count - first])
        self._count(perf_counter() - start, strategy, count)
        for cache, _ in rows:
            cache.advance(1)
        return logits

    def place(self, rows: Sequence[Row]) -> None:
        """Write the rows' tokens, positions and block tables where compiled code reads them.

        Raises `ValueError` for none or more than 32 rows, `ContextError` for one that its sequence has no block for.
        """
        if not 1 <= len(rows) <= MAX_BATCH:
            raise ValueError(f"a step takes 1 to {MAX_BATCH} rows, got {len(rows)}")
        shared, ends = self._shared, dict[int, int]()
        for number, (cache, token) in enumerate(rows):
            position = ends.get(id(cache), cache.length)
            ends[id(cache)] = position + 1
            if cache.missing(position + 1):
                cache.reserve_or_raise(position + 1)
            shared.tokens[number], shared.positions[number] = token, position
            used = position // cache.block_size + 1
            shared.tables[number, :used] = cache.table[:used]

    def _require(self, strategy: Strategy) -> None:
        """Raise `RuntimeError` where layers lack what the strategy names neurons by, of which there is no address."""
        column = _NAMED_BY.get(strategy)
        if column is not None and not self._table[0, column]:
            raise RuntimeError(f"this engine was not loaded for {strategy}, and has nothing to name neurons by")

    def load_kernels(self) -> None:
        """Compile the step, or read it from its cache, by a run over no layers and no head, which reads one row."""
        self._shared.tokens[0] = self._shared.positions[0] = 0
        self._run(self._table[-1:], self._shape._replace(vocab=0), 1)

    def arguments(self, strategy: Strategy) -> StepArguments:
        """What compiled code needs of the model; where a GPU names neurons, that is not here."""
        shape, eps = self._shape._replace(strategy=_STRATEGIES[strategy]), float(self._model.spec.norm_eps)
        return StepArguments(self._likes, self._table, shape, eps, self._rotation, self._shared, self._owns)

    def _run(self, table: np.ndarray, shape: Shape, rows: int, first: int = 0) -> None:
        pool, numbers = self._runtime.pool, self._numbers
        numbers[: len(shape)], numbers[Number.ROWS], numbers[Number.FIRST] = shape, rows, first
        buffers = self._shared_table, self._own_tables
        pool.run(decode_step, pool.threads, pool.barrier, self._likes[:5], table, numbers, *buffers)

    def _count(self, seconds: float, strategy: Strategy, rows: int) -> None:
        counters, spec = self._runtime.counters, self._model.spec
        tallies, ticks = self._shared.tallies.tolist(), self._shared.ticks.tolist()
        hot, cold = tallies[Count.FIRED_HOT], tallies[Count.FIRED_COLD]
        counters.neurons += rows * spec.n_layers * spec.d_ff
        counters.union += tallies[Count.UNION]
        counters.computed += hot + cold if strategy == "exact" else tallies[Count.COMPUTED]
        counters.fired += hot + cold
        counters.fired_hot += hot
        each = seconds / max(1, sum(ticks))
        counters.attention_seconds += each * ticks[Phase.ATTENTION]
        counters.predictor_seconds += each * ticks[Phase.PREDICTOR]
        counters.ffn_seconds += each * ticks[Phase.FFN]
        counters.head_seconds += each * ticks[Phase.HEAD]

    def _layer(self, number: int, block: Block) -> np.ndarray:
        """The table's row of one layer."""
        row = np.zeros(len(Column), np.int64)
        attention, ffn = block.attention, block.ffn
        matrices, predictor = ffn.matrices, ffn.predictor
        for column, matrix in (
            (Column.QKV, attention.qkv.matrix),
            (Column.OUT, attention.out.matrix),
            (Column.GATE, matrices.gate),
            (Column.UP, matrices.up),
            (Column.DOWN, matrices.down),
        ):
            row[column] = 0 if matrix is None else matrix.rows.ctypes.data
        for column, vector in (
            (Column.QKV_BIAS, attention.qkv.bias),
            (Column.OUT_BIAS, attention.out.bias),
            (Column.ATTENTION_NORM, _weight(block.norms.attention)),
            (Column.ATTENTION_NORM_BIAS, _bias(block.norms.attention)),
            (Column.FFN_NORM, _weight(block.norms.ffn)),
            (Column.FFN_NORM_BIAS, _bias(block.norms.ffn)),
            (Column.ATTENTION_POST_NORM, _weight(block.norms.attention_post)),
            (Column.FFN_POST_NORM, _weight(block.norms.ffn_post)),
            (Column.Q_NORM, _weight(attention.q_norm)),
            (Column.K_NORM, _weight(attention.k_norm)),
            (Column.Q_NORM_BIAS, _bias(attention.q_norm)),
            (Column.K_NORM_BIAS, _bias(attention.k_norm)),
            (Column.GATE_BIAS, matrices.gate_bias),
            (Column.UP_BIAS, matrices.up_bias),
            (Column.DOWN_BIAS, matrices.down_bias),
        ):
            row[column] = self._vector(vector)
        row[Column.KV] = self._cache.data[number].ctypes.data
        if self._cache.scales is not None:
            row[Column.KV_SCALES] = self._cache.scales[number].ctypes.data
        row[Column.WINDOW] = attention.window or 0
        row[Column.HOT] = ffn.hot
        row[Column.ROTATION] = attention.rope * self._cache.capacity
        if predictor is not None:
            self._put_predictor(row, predictor)
        if ffn.certificate is not None:
            self._put_certificate(row, ffn.certificate)
        if ffn.proxy is not None:
            self._put_proxy(row, ffn.proxy)
        return row

    def _put_predictor(self, row: np.ndarray, predictor: PredictorView) -> None:
        row[Column.FC1], row[Column.FC2] = predictor.fc1.ctypes.data, predictor.fc2.ctypes.data
        for column, vector in (
            (Column.FC1_SCALE, predictor.s1),
            (Column.FC1_BIAS, predictor.b1),
            (Column.FC2_SCALE, predictor.s2),
            (Column.FC2_BIAS, predictor.b2),
        ):
            row[column] = vector.ctypes.data
        row[Column.RANK] = len(predictor.b1)
        row[Column.THRESHOLD] = np.float32(predictor.threshold).view(np.int32)
        self._kept += [predictor.fc1, predictor.fc2, predictor.s1, predictor.b1, predictor.s2, predictor.b2]

    def _put_certificate(self, row: np.ndarray, certificate: CertificateView) -> None:
        for column, part in (
            (Column.COPY, certificate.rows),
            (Column.COPY_SLOPE, certificate.slope),
            (Column.COPY_REST, certificate.rest),
        ):
            row[column] = part.ctypes.data
        self._kept += [certificate.rows, certificate.slope, certificate.rest]

    def _put_proxy(self, row: np.ndarray, proxy: ProxyView) -> None:
        if proxy.up.dtype != "int4":
            raise ValueError(f"the step names neurons by copies in int4, got {proxy.up.dtype}")
        gate = None if proxy.gate is None else proxy.gate.rows
        for column, part in (
            (Column.COPY, gate),
            (Column.COPY_UP, proxy.up.rows),
            (Column.COPY_LENGTHS, proxy.lengths),
        ):
            row[column] = 0 if part is None else part.ctypes.data
        row[Column.THRESHOLD] = np.float32(proxy.threshold).view(np.int32)
        self._kept += [part for part in (gate, proxy.up.rows, proxy.lengths) if part is not None]

    def _ends(self) -> np.ndarray:
        row, model = np.zeros(len(Column), np.int64), self._model
        row[Ends.EMBEDDING] = model.embedding.rows.ctypes.data
        row[Ends.POSITIONS] = 0 if model.positions is None else model.positions.rows.ctypes.data
        if model.spec.embedding_norm:
            row[Ends.EMBEDDING_NORM] = self._vector(torch.ones(model.spec.d_model))
        row[Ends.FINAL_NORM] = self._vector(model.final_norm.weight)
        row[Ends.FINAL_NORM_BIAS] = self._vector(model.final_norm.bias)
        row[Ends.HEAD] = model.head.matrix.rows.ctypes.data
        return row

    def _vector(self, vector: torch.Tensor | None) -> int:
        """Address of an f32 copy that lives as long as this step; 0 for none."""
        if vector is None:
            return 0
        self._kept.append(vector.float().contiguous().numpy())
        return self._kept[-1].ctypes.data

    def _angles(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines f32 of each RoPE [capacity, head_dim / 2], one after another; of no columns for none."""
        found = self._model.step_rotations(capacity)
        if not found:
            return np.empty((capacity, 0), np.float32), np.empty((capacity, 0), np.float32)
        cos, sin = (torch.cat(angles).contiguous().numpy() for angles in zip(*found, strict=True))
        return cos, sin


def _weight(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight


def _bias(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.bias
