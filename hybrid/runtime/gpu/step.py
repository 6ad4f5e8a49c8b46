"""`GpuStep`: one decode step with its dense parts and hot neurons on the GPU, its cold neurons on the CPU meanwhile.

    norm QKV rope attention output | post name send    | hot FFN              | receive, norm of the next layer
                                               CPU: cold FFN of the active rows

Where a model's FFN takes the same input as attention, it is begun first: the CPU computes during attention, too.

A step takes rows, each the next token of some sequence of one KV pool: several sequences' tokens, or several of one. It
is captured once for each strategy and number of rows (1, 2, 4, 8, 16 or 32; others are filled up by repeating the last
row) as a CUDA graph and replayed; embeddings, positions and block tables are device data, which two copies bring at its
start. The neurons of a layer are those that some row needs, with a bit for each row that does. Who waits: the caller
for the end of a replay, `receive` on the GPU for the CPU's workers, those for `send` (`gpu_kernels/mailbox.py`,
`cold_workers.py` here). Layers without cold neurons send nothing, layers without hot ones compute none here; a whole
layer, or the head, on the CPU is a request of its own. Without a GPU, as in tests, the same kernels run one after
another in Triton's interpreter.

A row's logits are those that it has alone, but for rounding: rows of down are summed in parts of the neurons that all
rows need (`gpu_kernels/sparse_ffn.py`), and 8 rows and more go through tensor cores where weights have 16 bits
(`row_gemm.py`, `row_ffn.py`), in another order than fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from cpu_kernels.contract import Op
from cpu_kernels.decode_buffers import Count
from gpu_kernels.attention import decode_attention
from gpu_kernels.box import State, ZeroCopy
from gpu_kernels.certificate import certify
from gpu_kernels.gemv import gemv
from gpu_kernels.low_rank import predict
from gpu_kernels.mailbox import ask, post, receive, send
from gpu_kernels.norm import residual_norm
from gpu_kernels.proxy import name_passing
from gpu_kernels.rope import rope
from gpu_kernels.sparse_ffn import DeviceFFNView, down_parts, sparse_ffn
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.rope import Rotation
from hybrid.model.transformer import Transformer
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.buffers import WORKSPACE, StepBuffers
from hybrid.runtime.gpu.cold_workers import ColdWorkers
from hybrid.runtime.gpu.host_rows import HostRows
from hybrid.runtime.gpu.rows import StepRows, places_size, size_of
from hybrid.runtime.gpu.sampler import DeviceSampler
from hybrid.runtime.gpu.weights import GpuLayer, GpuWeights, normed_heads
from hybrid.runtime.sampling import Choice, Sampler, most_likely
from placement.placement import Placement
from placement.workspace import BATCHES, ENGINE_ROWS
from profiler.common.spec import NAMING, Strategy


class _Listed(NamedTuple):
    """Neurons that the GPU computes: ids int32 [capacity], how many of them count, their tokens where several."""

    ffn: DeviceFFNView
    ids: torch.Tensor
    number: torch.Tensor
    masks: torch.Tensor | None


class GpuStep:
    """A model's step over two devices. It holds the model and the cache, neither of which may be replaced."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        runtime: FFNRuntime,
        placement: Placement,
        arena: DeviceArena,
        host: HostRows | None = None,
        rows: int = ENGINE_ROWS,
    ) -> None:
        """Copies to the GPU what `placement` puts there; all that it takes there comes out of `arena`.

        cache: a sequence of the pool, by whose table and capacity all others may go. host: cold neurons whose rows
        the GPU reads in host memory, by default none. rows: the most of a step, one of `BATCHES`.
        """
        layers, most_zero_copy = ({}, 0) if host is None else (host.zero_copy, host.most_zero_copy)
        self._host = host  # whose rows the kernels read
        self._model, self._cache, self._runtime = model, cache, runtime
        self._native = arena.device.type == "cuda"
        self._graphs: dict[tuple[Strategy, int], torch.cuda.CUDAGraph] = {}
        self._step = CpuStep(model, cache, runtime)
        self.weights = GpuWeights.take(arena, model, placement, cache, layers)
        views = [None if layer is None else layer.ffn for layer in self.weights.layers]
        self._hot = [0 if view is None else view.up.shape[0] for view in views]
        self._buffers = StepBuffers.take(arena, model, torch.tensor(self._hot), most_zero_copy, cache, rows)
        self._workers = ColdWorkers(self._step, runtime.pool, arena)
        self._sampler = DeviceSampler(arena, WORKSPACE, model.spec.vocab_size, rows)
        self._layer_tallies = self._step.arguments("dense").shared.tallies  # of layers that are on the CPU as a whole
        spec, pinned = model.spec, self._native and not arena.counts_only
        self._rows = StepRows(model, self._step, rows, pinned)
        self._logits = torch.zeros(rows, spec.vocab_size, pin_memory=pinned)
        self._report = torch.zeros(self._workers.report.shape, dtype=torch.int64, pin_memory=pinned)

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """Of each RoPE cosines and sines f32 [capacity, head_dim / 2] on the device; none for learned positions."""
        return self._buffers.rotations

    @property
    def logits(self) -> torch.Tensor:
        """f32 [rows, vocab] on the device: scratch between two steps."""
        return self._buffers.logits

    def run(self, rows: Sequence[Row], strategy: Strategy) -> torch.Tensor:
        """Logits [rows, vocab] f32 after one more token of each row, which joins its sequence; a buffer that the next
        call overwrites. Raises `ValueError` for more rows than there is room for."""
        self._step_over(rows, strategy, self._take_logits)
        return self._logits[: len(rows)]

    def next_tokens(self, rows: Sequence[Row], choices: Sequence[Choice], strategy: Strategy) -> list[int]:
        """What each row's choice takes after its token, on the GPU where the choice allows it and the head is there.

        Raises `RuntimeError` for logits that are not numbers.
        """
        if self.weights.head is None:
            return [
                most_likely(logits) if choice.takes_largest else choice.pick(logits)
                for logits, choice in zip(self.run(rows, strategy), choices, strict=True)
            ]

        def choose(count: int) -> None:
            self._sampler.queue(self._buffers.logits[:count], choices, self._logits)

        self._step_over(rows, strategy, choose)
        return self._sampler.tokens(self._buffers.logits, choices, self._logits)

    def load_kernels(self, strategy: Strategy) -> None:
        """Compile and capture the step for one row, and where it may have many for any number; sequences stay as they
        are."""
        self.rest()  # the CPU's step runs on the same pool
        self._step.load_kernels()
        if self._native:
            self._capture_ahead(strategy)
        if self.weights.head is not None:
            self._sampler.load_kernels(self._buffers.logits[:1], [Sampler(SamplingSettings())])
        self.rest()

    def rest(self) -> None:
        """Let the workers sleep until the next token."""
        self._workers.stop()

    def _step_over(self, rows: Sequence[Row], strategy: Strategy, take: Callable[[int], None]) -> None:
        """The step for some rows; `take` of how many, queued while it runs, copies what is asked of their logits to the
        host."""
        size = size_of(len(rows))
        if self._native and (strategy, size) not in self._graphs:
            self._embed(rows, size)
            self._capture(strategy, size)
            self.rest()  # so that what the capture sent is not counted
        begun = perf_counter()
        self._workers.start(strategy)
        self._layer_tallies[:] = 0
        self._embed(rows, size)
        if self._native:
            self._graphs[strategy, size].replay()
        else:
            self._launch(strategy, size)
        take(len(rows))
        if self._native:
            torch.cuda.current_stream().synchronize()
        self._check(len(rows))
        self._count(strategy, perf_counter() - begun, len(rows))
        for row in rows:
            row.cache.advance(1)

    def _take_logits(self, count: int) -> None:
        if self.weights.head is not None:
            self._logits[:count].copy_(self._buffers.logits[:count], non_blocking=True)

    def _embed(self, rows: Sequence[Row], size: int) -> None:
        """Put the rows where the step takes them from."""
        self._rows.fill(rows, size)

    def _capture_ahead(self, strategy: Strategy) -> None:
        """Capture steps before there are rows. What follows the sequence is scratch, a block of it for this time only
        where it has none."""
        held = not self._cache.blocks and self._cache.reserve(1)
        if not self._cache.missing(self._cache.length + 1):
            most = self._rows.most if self._rows.most > ENGINE_ROWS else 1
            for size in (size for size in BATCHES if size <= most):
                self._embed([Row(self._cache, 0)], size)
                self._capture(strategy, size)
        if held:
            self._cache.release()

    def _capture(self, strategy: Strategy, size: int) -> None:
        """Run the step once over the rows that are there, which compiles its kernels, then capture it."""
        self._workers.start(strategy)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch(strategy, size)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._launch(strategy, size)
        self._graphs[strategy, size] = graph

    def _launch(self, strategy: Strategy, count: int) -> None:
        """All kernels of a step for `count` rows."""
        b, norms, spec = self._buffers, self.weights.norms, self._model.spec
        eps = float(spec.norm_eps)
        x, normed, places = b.x[:count], b.normed[:count], places_size(count, b.blocks)
        x.copy_(self._rows.embedded[:count], non_blocking=True)
        b.places[:places].copy_(self._rows.places[:places], non_blocking=True)
        positions, table = b.where(count)
        residual_norm(x, norms[0].weight, norms[0].bias, eps, normed)
        for number, layer in enumerate(self.weights.layers):
            following = norms[number + 1]
            if layer is None:
                box = self._workers.mailbox
                ask(Op.LAYER, number, x, box, positions, count)
                receive(x, None, None, following.weight, following.bias, eps, normed, box, asked=True, replace=True)
            elif spec.parallel:
                ways = self._begin_ffn(number, layer, strategy, x, b.ahead[:count], positions, eps)
                self._attention(layer, x, normed, positions, table, eps)
                self._end_ffn(number, layer, strategy, ways, x, b.ahead[:count], eps)
            else:
                self._attention(layer, x, normed, positions, table, eps)
                ways = self._begin_ffn(number, layer, strategy, x, normed, positions, eps)
                self._end_ffn(number, layer, strategy, ways, x, normed, eps)
        self._head(x, normed, positions, eps)
        self._report.copy_(self._workers.report, non_blocking=True)

    def _attention(
        self,
        layer: GpuLayer,
        x: torch.Tensor,
        normed: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        eps: float,
    ) -> None:
        """x += attention of `normed`."""
        b, spec, count = self._buffers, self._model.spec, x.shape[0]
        qkv, attended = b.qkv[:count], b.attended[:count]
        gemv(layer.qkv, normed, layer.qkv_bias, qkv, scratch=b.gemm)
        cos, sin = b.rotations[layer.rope] if b.rotations else (None, None)
        norms = normed_heads(qkv, layer, spec, eps)
        rope(
            qkv, cos, sin, norms.q, norms.k, eps, positions, table, layer.cache, spec.n_heads, norms.q_bias,
            norms.k_bias, layer.scales,
        )  # fmt: skip
        q = qkv.view(count, -1, spec.head_dim)[:, : spec.n_heads]
        scratch = b.attention(count)
        decode_attention(q, layer.cache, table, positions, layer.window, attended, scratch, layer.scales)
        post = layer.attention_post
        if post is None:
            gemv(layer.out, attended, layer.out_bias, x, add=True, scratch=b.gemm)
            return
        added = b.added[:, :count]
        gemv(layer.out, attended, layer.out_bias, added[0], scratch=b.gemm)
        residual_norm(added[0], post.weight, post.bias, eps, added[1])
        residual_norm(x, None, None, eps, None, added[1:])

    def _begin_ffn(
        self,
        number: int,
        layer: GpuLayer,
        strategy: Strategy,
        x: torch.Tensor,
        normed: torch.Tensor,
        positions: torch.Tensor,
        eps: float,
    ) -> list[_Listed]:
        """normed = norm of x; ask the CPU for its neurons of it; returns those that are the GPU's to compute."""
        b, spec, count, hot, box = self._buffers, self._model.spec, x.shape[0], self._hot[number], self._workers.mailbox
        norm, cold = layer.ffn_norm, spec.d_ff - hot
        if cold:
            post(x, norm.weight, norm.bias, eps, normed, box)
        else:
            residual_norm(x, norm.weight, norm.bias, eps, normed)
        ids, masks, total = b.every[:hot], None, b.counts[number : number + 1]
        zero_copy = None
        if strategy in NAMING:
            self._name(layer, strategy, normed)
            ids, masks, total = b.hot_ids[:hot], b.hot_masks[:hot] if count > 1 else None, b.hot_count
            if layer.zero_copy is not None:
                zero_copy = ZeroCopy(
                    hot + layer.zero_copy.up.shape[0], b.zero_copy_ids, b.zero_copy_masks, b.zero_copy_count
                )
            send(b.masks, hot, b.hot_ids, b.hot_masks, b.hot_count, b.spare, box, number, positions, zero_copy)
        elif cold:
            ask(Op.FFN, number, None, box, positions, count, cold)
        ways = []
        if layer.ffn is not None:
            ways.append(_Listed(layer.ffn, ids, total, masks))
        if zero_copy is not None and layer.zero_copy is not None:
            listed = zero_copy.stop - hot
            masks = zero_copy.masks[:listed] if count > 1 else None
            ways.append(_Listed(layer.zero_copy, zero_copy.ids[:listed], zero_copy.count, masks))
        return ways

    def _name(self, layer: GpuLayer, strategy: Strategy, normed: torch.Tensor) -> None:
        """b.masks = which neurons some row needs, by the layer's predictor, its certificate or its proxy."""
        b, count = self._buffers, normed.shape[0]
        if strategy == "certified":
            assert layer.certificate is not None
            certify(layer.certificate, normed, b.masks)
        elif strategy == "proxy":
            assert layer.proxy is not None
            name_passing(layer.proxy, normed, b.masks)
        else:
            assert layer.predictor is not None
            predict(layer.predictor, normed, b.units[: count * len(layer.predictor.b1)].view(count, -1), b.masks)

    def _end_ffn(
        self,
        number: int,
        layer: GpuLayer,
        strategy: Strategy,
        ways: list[_Listed],
        x: torch.Tensor,
        normed: torch.Tensor,
        eps: float,
    ) -> None:
        """x += FFN of `normed`; b.normed is then what the next layer begins with."""
        b, count, following = self._buffers, x.shape[0], self.weights.norms[number + 1]
        box, asked = self._workers.mailbox, self._hot[number] < self._model.spec.d_ff
        parts = self._parts(len(ways), count)
        for listed, its_parts in zip(ways, parts, strict=True):
            hidden = b.hidden[: count * len(listed.ids)].view(count, len(listed.ids))
            # Most named neurons fire, and rows of up in VRAM cost less than the wait for their gates.
            eager = strategy in NAMING and listed.ffn is layer.ffn
            given = listed.ffn, normed, listed.ids, listed.number, listed.masks
            # Rows read over PCIe are worth a look at which are needed.
            scratch = b.gemm if listed.ffn is layer.ffn else None
            sparse_ffn(*given, hidden, its_parts, strategy != "dense", eager, scratch=scratch)
        sums, post = parts.flatten(0, 1) if ways else None, layer.ffn_post
        if post is None:
            out = b.normed[:count]
            receive(x, sums, layer.down_bias, following.weight, following.bias, eps, out, box, asked=asked)
            return
        added = b.added[:, :count]
        added[0].zero_()
        receive(added[0], sums, layer.down_bias, post.weight, post.bias, eps, added[1], box, asked=asked)
        residual_norm(x, following.weight, following.bias, eps, b.normed[:count], added[1:])

    def _parts(self, ways: int, count: int) -> torch.Tensor:
        """Room for the parts of down, [ways, s, t, d], of the hot and of the zero-copy neurons."""
        d = self._model.spec.d_model
        return self._buffers.parts[: ways * down_parts(d) * count * d].view(ways, down_parts(d), count, d)

    def _head(self, x: torch.Tensor, normed: torch.Tensor, positions: torch.Tensor, eps: float) -> None:
        """Logits of the final norm's output; a head on the CPU leaves them there."""
        b, count, norm = self._buffers, x.shape[0], self.weights.norms[-1]
        if self.weights.head is not None:
            gemv(self.weights.head, normed, None, b.logits[:count], scratch=b.gemm)
            self._model.capped(b.logits[:count])
            return
        box, ends = self._workers.mailbox, len(self.weights.layers)
        ask(Op.HEAD, ends, x, box, positions, count)
        receive(x, None, None, norm.weight, norm.bias, eps, normed, box, asked=True)

    def _check(self, count: int) -> None:
        """Raise what went wrong in a step. The workers start anew with the next one."""
        try:
            self._workers.check()
            if int(self._report[State.FAILED]):
                raise self._workers.late()
        except BaseException:
            self.rest()
            raise
        if self.weights.head is None:
            self._logits[:count] = self._model.capped(torch.from_numpy(self._workers.logits[:count]))

    def _count(self, strategy: Strategy, seconds: float, rows: int) -> None:
        """Neurons and seconds of a step. Named neurons count as fired on the side that they were sent to, and those
        that some row needs for every row; without a prediction every neuron of the two sides is computed, and which of
        them fired is not known."""
        counters, spec = self._runtime.counters, self._model.spec
        hot, cold = self._workers.sent(self._report)
        counters.neurons += spec.n_layers * spec.d_ff * rows
        counters.ffn_seconds += seconds
        counters.wait_seconds += self._workers.waited(self._report)
        if strategy not in NAMING:
            counters.computed += spec.n_layers * spec.d_ff * rows
            counters.union += spec.n_layers * spec.d_ff
            return
        cold += int(self._layer_tallies[Count.UNION])
        counters.union += hot + cold
        counters.computed += (hot + cold) * rows
        counters.fired += (hot + cold) * rows
        counters.fired_hot += hot * rows
