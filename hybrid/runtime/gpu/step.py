"""`GpuStep`: one decode step with its dense parts and hot neurons on the GPU, its cold neurons on the CPU meanwhile.

    norm QKV rope attention output | post predict send | hot FFN              | receive, norm of the next layer
                                               CPU: cold FFN of the active rows

Where a model's FFN takes the same input as attention, it is begun first: the CPU computes during attention, too.

The step is captured once for each strategy and batch size (1, 2, 4 or 8 tokens of one sequence) as a CUDA graph and
replayed; token, position and sequence length are device data. Who waits: the caller for the end of a replay, `receive`
on the GPU for the CPU's workers, those for `send` (`gpu_kernels/mailbox.py`, `cold_workers.py` here). Layers without
cold neurons send nothing, layers without hot ones compute none here; a whole layer, or the head, on the CPU is a
request of its own. Without a GPU, as in tests, the same kernels run one after another in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from cpu_kernels.contract import MAX_BATCH, Op
from cpu_kernels.decode_buffers import Count
from gpu_kernels.attention import decode_attention
from gpu_kernels.box import State, ZeroCopy
from gpu_kernels.gemv import gemv
from gpu_kernels.low_rank import predict
from gpu_kernels.mailbox import ask, post, receive, send
from gpu_kernels.norm import residual_norm
from gpu_kernels.rope import rope
from gpu_kernels.sparse_ffn import DeviceFFNView, down_parts, sparse_ffn
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.rope import Rotation
from hybrid.model.transformer import Transformer
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.buffers import BATCHES, WORKSPACE, StepBuffers
from hybrid.runtime.gpu.cold_workers import ColdWorkers
from hybrid.runtime.gpu.sampler import DeviceSampler
from hybrid.runtime.gpu.weights import GpuLayer, GpuWeights, normed_heads
from hybrid.runtime.gpu.zero_copy import ZeroCopyNeurons
from hybrid.runtime.sampling import Choice, most_likely, not_numbers
from placement.placement import Placement
from profiler.common.spec import Strategy


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
        zero_copy: ZeroCopyNeurons | None = None,
    ) -> None:
        """Copies to the GPU what `placement` puts there; all that it takes there comes out of `arena`.

        zero_copy: cold neurons that the GPU reads in host memory, by default none.
        """
        layers, most_zero_copy = ({}, 0) if zero_copy is None else (zero_copy.layers, zero_copy.most)
        self._zero_copy = zero_copy  # whose rows the kernels read
        self._model, self._cache, self._runtime = model, cache, runtime
        self._native = arena.device.type == "cuda"
        self._graphs: dict[tuple[Strategy, int], torch.cuda.CUDAGraph] = {}
        self._step = CpuStep(model, cache, runtime)
        self.weights = GpuWeights.take(arena, model, placement, cache, layers)
        views = [None if layer is None else layer.ffn for layer in self.weights.layers]
        self._hot = [0 if view is None else view.up.shape[0] for view in views]
        self._buffers = StepBuffers.take(arena, model, torch.tensor(self._hot), most_zero_copy, cache)
        self._workers = ColdWorkers(self._step, runtime.pool, arena)
        self._sampler = DeviceSampler(arena, WORKSPACE, model.spec.vocab_size)
        self._layer_tallies = self._step.arguments("dense").shared.tallies  # of layers that are on the CPU as a whole
        spec, pinned = model.spec, self._native and not arena.counts_only
        self._embedded = torch.zeros(MAX_BATCH, spec.d_model, pin_memory=pinned)
        self._positions = torch.zeros(MAX_BATCH, dtype=torch.int32, pin_memory=pinned)
        self._logits = torch.zeros(MAX_BATCH, spec.vocab_size, pin_memory=pinned)
        self._report = torch.zeros(self._workers.report.shape, dtype=torch.int64, pin_memory=pinned)

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """Of each RoPE cosines and sines f32 [capacity, head_dim / 2] on the device; none for learned positions."""
        return self._buffers.rotations

    def run(self, token: int, strategy: Strategy) -> torch.Tensor:
        """Logits [vocab] f32 after `token`, which joins the KV cache; a buffer that the next call overwrites."""
        return self._tokens((token,), strategy)[0]

    def greedy(self, token: int, strategy: Strategy) -> int:
        """The id of the largest logit after `token`, found on the GPU where the head is there.

        Raises `RuntimeError` for logits that are not numbers.
        """
        if self.weights.head is None:
            return most_likely(self.run(token, strategy))
        self._step_over((token,), strategy, self._take_largest)
        if self._sampler.token < 0:
            raise not_numbers()
        return self._sampler.token

    def draw(self, token: int, strategy: Strategy, sampler: Choice) -> int:
        """The token that a `Choice` that `draws_from_few` draws after `token`: on the GPU where the head is there.

        Raises `RuntimeError` for logits that are not numbers.
        """
        if self.weights.head is None:
            return sampler.pick(self.run(token, strategy))
        point = sampler.uniform()

        def draw(count: int) -> None:
            self._sampler.draw(self._buffers.logits[:count], sampler.settings, point)

        self._step_over((token,), strategy, draw)
        if self._sampler.token >= 0:
            return self._sampler.token
        self._logits[:1] = self._buffers.logits[:1]  # more tokens are in it than the GPU keeps: the host draws
        return sampler.pick(self._logits[0], uniform=point)

    def few(self, tokens: Sequence[int], strategy: Strategy) -> torch.Tensor:
        """Logits [vocab] after some tokens, which go through in batches of up to 8."""
        at = 0
        while at < len(tokens):
            batch = next(size for size in BATCHES if size <= len(tokens) - at)
            logits = self._tokens(tokens[at : at + batch], strategy)
            at += batch
        return logits[-1]

    def load_kernels(self, strategy: Strategy) -> None:
        """Compile and capture the step for one token; the cache stays as it is."""
        self.rest()  # the CPU's step runs on the same pool
        self._step.load_kernels()
        if self._native:
            self._capture(strategy, 1)
        if self.weights.head is not None:
            self._take_largest(1)
            self._sampler.draw(self._buffers.logits[:1], SamplingSettings(), 0.0)
        self.rest()

    def rest(self) -> None:
        """Let the workers sleep until the next token."""
        self._workers.stop()

    def _tokens(self, tokens: Sequence[int], strategy: Strategy) -> torch.Tensor:
        """Logits [t, vocab] of t tokens, of which a head on the CPU computes the last only."""
        self._step_over(tokens, strategy, self._take_logits)
        return self._logits[: len(tokens)]

    def _step_over(self, tokens: Sequence[int], strategy: Strategy, take: Callable[[int], None]) -> None:
        """The step for t tokens; `take` of t, queued while it runs, copies what is asked of its logits to the host."""
        count, start = len(tokens), self._cache.length
        if self._native and (strategy, count) not in self._graphs:
            self._capture(strategy, count)
            self.rest()  # so that what the capture sent is not counted
        begun = perf_counter()
        self._workers.start(strategy)
        self._layer_tallies[:] = 0
        self._embed(tokens, start)
        if self._native:
            self._graphs[strategy, count].replay()
        else:
            self._launch(strategy, count)
        take(count)
        if self._native:
            torch.cuda.current_stream().synchronize()
        self._check()
        self._count(strategy, perf_counter() - begun, count)
        self._cache.advance(count)

    def _take_logits(self, count: int) -> None:
        if self.weights.head is not None:
            self._logits[:count].copy_(self._buffers.logits[:count], non_blocking=True)

    def _take_largest(self, count: int) -> None:
        self._sampler.greedy(self._buffers.logits[:count])

    def _embed(self, tokens: Sequence[int], start: int) -> None:
        for at, token in enumerate(tokens):  # mostly one
            self._embedded[at : at + 1] = self._model.embed(token, start + at)
            self._positions[at] = start + at

    def _capture(self, strategy: Strategy, count: int) -> None:
        """Run the step once, which compiles its kernels, then capture it. Position 0 of an empty cache is scratch."""
        kept = self._positions.clone()
        self._positions[:] = torch.arange(self._cache.length, self._cache.length + MAX_BATCH).clamp(
            max=self._cache.capacity - 1
        )
        self._workers.start(strategy)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch(strategy, count)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._launch(strategy, count)
        self._graphs[strategy, count] = graph
        self._positions[:] = kept

    def _launch(self, strategy: Strategy, count: int) -> None:
        """All kernels of a step for `count` tokens."""
        b, norms, spec = self._buffers, self.weights.norms, self._model.spec
        eps = float(spec.norm_eps)
        x, normed, positions = b.x[:count], b.normed[:count], b.positions[:count]
        x.copy_(self._embedded[:count], non_blocking=True)
        positions.copy_(self._positions[:count], non_blocking=True)
        residual_norm(x, norms[0].weight, norms[0].bias, eps, normed)
        for number, layer in enumerate(self.weights.layers):
            following = norms[number + 1]
            if layer is None:
                box = self._workers.mailbox
                ask(Op.LAYER, number, x, box, positions, count)
                receive(x, None, None, following.weight, following.bias, eps, normed, box, asked=True, replace=True)
            elif spec.parallel:
                ways = self._begin_ffn(number, layer, strategy, x, b.ahead[:count], positions, eps)
                self._attention(layer, x, normed, positions, eps)
                self._end_ffn(number, layer, strategy, ways, x, b.ahead[:count], eps)
            else:
                self._attention(layer, x, normed, positions, eps)
                ways = self._begin_ffn(number, layer, strategy, x, normed, positions, eps)
                self._end_ffn(number, layer, strategy, ways, x, normed, eps)
        self._head(x, normed, positions, eps)
        self._report.copy_(self._workers.report, non_blocking=True)

    def _attention(
        self, layer: GpuLayer, x: torch.Tensor, normed: torch.Tensor, positions: torch.Tensor, eps: float
    ) -> None:
        """x += attention of `normed`."""
        b, spec, count = self._buffers, self._model.spec, x.shape[0]
        qkv, attended = b.qkv[:count], b.attended[:count]
        table = b.table.expand(count, -1)
        gemv(layer.qkv, normed, layer.qkv_bias, qkv)
        cos, sin = b.rotations[layer.rope] if b.rotations else (None, None)
        norms = normed_heads(qkv, layer, spec, eps)
        rope(
            qkv, cos, sin, norms.q, norms.k, eps, positions, table, layer.cache, spec.n_heads, norms.q_bias,
            norms.k_bias,
        )  # fmt: skip
        q = qkv.view(count, -1, spec.head_dim)[:, : spec.n_heads]
        decode_attention(q, layer.cache, table, positions, layer.window, attended, b.attention[count])
        post = layer.attention_post
        if post is None:
            gemv(layer.out, attended, layer.out_bias, x, add=True)
            return
        added = b.added[:, :count]
        gemv(layer.out, attended, layer.out_bias, added[0])
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
        if strategy == "learned":
            assert layer.predictor is not None
            predict(layer.predictor, normed, b.units[: count * len(layer.predictor.b1)].view(count, -1), b.masks)
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
            # Nearly all predicted neurons fire, and rows of up in VRAM cost less than the wait for their gates.
            eager = strategy == "learned" and listed.ffn is layer.ffn
            given = listed.ffn, normed, listed.ids, listed.number, listed.masks
            sparse_ffn(*given, hidden, its_parts, strategy != "dense", eager)
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
            gemv(self.weights.head, normed, None, b.logits[:count])
            self._model.capped(b.logits[:count])
            return
        box, ends = self._workers.mailbox, len(self.weights.layers)
        ask(Op.HEAD, ends, x, box, positions, count)
        receive(x, None, None, norm.weight, norm.bias, eps, normed, box, asked=True)

    def _check(self) -> None:
        """Raise what went wrong in a step. The workers start anew with the next one."""
        try:
            self._workers.check()
            if int(self._report[State.FAILED]):
                raise self._workers.late()
        except BaseException:
            self.rest()
            raise
        if self.weights.head is None:
            self._logits[:] = self._model.capped(torch.from_numpy(self._workers.logits))

    def _count(self, strategy: Strategy, seconds: float, tokens: int) -> None:
        """Neurons and seconds of a step. Predicted neurons count as fired on the side that they were sent to; without a
        prediction every neuron of the two sides is computed, and which of them fired is not known."""
        counters, spec = self._runtime.counters, self._model.spec
        hot, cold = self._workers.sent(self._report)
        counters.neurons += spec.n_layers * spec.d_ff * tokens
        counters.ffn_seconds += seconds
        if strategy != "learned":
            counters.computed += spec.n_layers * spec.d_ff * tokens
            return
        cold += int(self._layer_tallies[Count.COMPUTED])
        counters.computed += hot + cold
        counters.fired += hot + cold
        counters.fired_hot += hot
