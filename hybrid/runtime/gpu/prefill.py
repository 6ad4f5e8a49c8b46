"""`GpuPrefill`: reads a prompt, many tokens at once, with dense parts and hot neurons on the GPU.

A prompt passes through in chunks, so that a layer's cold neurons come to the GPU once for many tokens; within a layer,
what is wide (QKV, hidden values) is computed for fewer tokens at a time. Nearly every neuron fires for some token of a
prompt, so all are computed: hot ones from the GPU's rows, of the cold ones as many as `split` says by the CPU, while
the others are streamed to the GPU (`cold_stream`) and computed there after the hot ones. Where all of the model is on
the GPU, a prompt goes in smaller pieces, as CUDA graphs (`prompt_graphs`).

Activations are f32; how exact products are, `gemm` says. Everything on the device comes out of the arena. Who waits:
the caller, once per chunk for all of it, and where the CPU has a part in a layer for its input. Without a GPU, as in
tests, the same code runs on the CPU, one thing after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from gpu_kernels.gemv import gemv
from gpu_kernels.norm import residual_norm
from gpu_kernels.prompt_attention import prompt_attention
from gpu_kernels.rope import rope
from gpu_kernels.sparse_ffn import DeviceFFNView
from gpu_kernels.tiles import TOGETHER
from hybrid.errors import ContextError
from hybrid.model.ffn import FFNMatrices, FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.rope import Rotation, rotation
from hybrid.model.transformer import Transformer
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.cold_stream import ColdStream
from hybrid.runtime.gpu.gemm import GpuGemm, pieces
from hybrid.runtime.gpu.prefill_buffers import PrefillBuffers
from hybrid.runtime.gpu.prompt_graphs import Piece, PromptGraphs, pieces_of
from hybrid.runtime.gpu.weights import GpuLayer, GpuNorm, GpuWeights, normed_heads
from placement.workspace import PREFILL_CHUNK, Workspace
from profiler.common.openmp import torch_threads

Split = Callable[[int, int, int], int]


@dataclass
class PrefillCounters:
    """Layers of which cold neurons were streamed to the GPU, of which some were computed by the CPU, a layer that is
    split among both; and layers wholly on the CPU. Each counts once per chunk."""

    streamed: int = 0
    computed: int = 0
    on_cpu: int = 0


@dataclass(frozen=True, eq=False)
class _OnHost:
    """A copy to the host that is under way."""

    values: torch.Tensor
    done: torch.cuda.Event | None

    def wait(self) -> torch.Tensor:
        if self.done is not None:
            self.done.synchronize()
        return self.values


class GpuPrefill:
    """A model's prefill over two devices. It holds the model and a cache, whose pool may not be replaced; sequences of
    that pool may have as many tokens as this one.

    counters: what was done with cold neurons so far; cpu_share: of each layer's cold neurons, computed by the CPU while
    the others are streamed; None leaves it to `split`.
    """

    def __init__(
        self,
        model: Transformer,
        weights: GpuWeights,
        cache: KVCache,
        runtime: FFNRuntime,
        arena: DeviceArena,
        split: Split,
        rotations: tuple[Rotation, ...],
        logits: torch.Tensor,
        registered: Mapping[int, FFNMatrices] = MappingProxyType({}),
    ) -> None:
        """split(tokens, start, layer): how many of the layer's cold neurons the CPU computes of a chunk of so many
        tokens after `start` others, while the rest is streamed. registered: of some layers the cold neurons, whose rows
        the GPU reads in host memory.

        rotations: of each of the model's RoPEs cosines and sines [capacity, head_dim / 2] f32 on the device; logits:
        f32 [n, vocab] of scratch there, for so many tokens at a time. Raises `ValueError` for another number of
        rotations.
        """
        if len(rotations) != (model.spec.rope is not None) + (model.spec.other_rope is not None):
            raise ValueError("prefill needs cosines and sines for each RoPE of the model, and none without any")
        self._model, self._weights, self._cache, self._runtime = model, weights, cache, runtime
        self._own, self._out = cache, logits[:TOGETHER]
        self._terms = 2 if runtime.precision == "fast" else 3  # of queries and of shares in attention
        self._split, self._eps = split, float(model.spec.norm_eps)
        self.cpu_share: float | None = None
        self._given, self._rotations, self._length = rotations, list(rotations), 0
        self.counters = PrefillCounters()
        self._chunk = min(PREFILL_CHUNK, cache.capacity)
        planned = Workspace(model.spec, cache.capacity, 0, self._chunk, 1)
        sizes, self._wide = planned.prefill_gemm, planned.prefill_gemm.tokens
        self._buffers = PrefillBuffers.take(arena, model, cache, self._chunk, sizes)
        self._gemm = GpuGemm(self._buffers.scratch, sizes, runtime.precision == "precise")
        cold = {
            number: ffn
            for number, (layer, ffn) in enumerate(zip(weights.layers, model.ffns, strict=True))
            if layer is not None and ffn.hot < ffn.up.shape[0]
        }
        self._cold = {number: ffn.up.shape[0] - ffn.hot for number, ffn in cold.items()}
        threads, staged = runtime.pool.threads, planned.staging_neurons
        self._stream = ColdStream(cold, staged, arena, registered, threads) if cold else None
        pinned = arena.device.type == "cuda" and not arena.counts_only
        self._device = arena.device
        self._host, self._sums = (
            torch.empty(0 if arena.counts_only else rows, model.spec.d_model, pin_memory=pinned)
            for rows in (self._chunk, self._chunk if cold else 0)
        )
        self._places = torch.empty(0 if arena.counts_only else self._chunk, dtype=torch.int32, pin_memory=pinned)
        self._graphs: PromptGraphs | None = None
        if not cold and all(layer is not None for layer in weights.layers):
            self._graphs = PromptGraphs(self._wide, arena.device, pinned)

    @torch.inference_mode()
    def read(
        self,
        tokens: Sequence[int],
        progress: Callable[[int, int], None] = lambda done, total: None,
        length: int | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Logits [vocab] f32 on the CPU after `tokens`, at least one, which join a sequence chunk by chunk.

        `progress(done, total)` follows the chunks. length: of all the text, where it goes on after them. cache: the
        sequence, by default its own. Workers of the decode step must be at rest, as the CPU's part of prefill runs on
        their pool. Raises `ContextError` when the tokens do not fit the sequence.
        """
        found = []

        def take(done: int, count: int) -> None:
            if done == len(tokens):
                found.append(self._logits(slice(count - 1, count))[0])

        self._through(tokens, length, cache, take, progress)
        return found[0]

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], length: int | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """As `read`, the logits [t, vocab] after each of the tokens."""
        found: list[torch.Tensor] = []
        self._through(tokens, length, cache, lambda done, count: found.append(self._logits(slice(0, count))))
        return torch.cat(found)

    def _through(
        self,
        tokens: Sequence[int],
        length: int | None,
        cache: KVCache | None,
        take: Callable[[int, int], None],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Take `tokens` through all layers, a chunk at a time, then `take(done, count)`: how many are through, and how
        many of the chunk, whose final states are in x."""
        self._cache = self._own if cache is None else cache
        end = self._cache.length + len(tokens)
        if end > self._cache.capacity:
            raise ContextError(f"{end} tokens do not fit a context of {self._cache.capacity}; shorten the prompt")
        if not len(tokens):
            raise ValueError("prefill needs at least one token")
        self._runtime.as_decode = False
        self._wait()  # for decode steps, which run in another stream than graphs
        with torch_threads(1), nullcontext() if self._graphs is None else self._graphs.stream():
            try:
                self._turn(max(end, length or 0))
                parts = self._pieces(len(tokens))
                self._buffers.table[: len(self._cache.table)].copy_(torch.from_numpy(self._cache.table))
                for number, (some, size) in enumerate(parts):
                    progress(some.start, len(tokens))
                    self._begin(tokens[some], size, self._rows_for(number))
                    if self._graphs is not None:
                        self._graphs.queue(size, self._all_here)
                    else:
                        self._layers(size, self._shared_out(size))
                    take(some.stop, some.stop - some.start)
                    self._cache.advance(some.stop - some.start)
            finally:
                self._wait()  # also for what a call that ends early has queued
        progress(len(tokens), len(tokens))

    @torch.inference_mode()
    def load_kernels(self) -> None:
        """Compile what reads prompts, and where all is on the GPU capture it; sequences stay as they are."""
        if self._device.type != "cuda":
            return
        if self._graphs is not None:
            with self._graphs.stream():
                self._turn(1)
                for size in self._graphs.sizes:
                    self._graphs.capture(size, self._all_here, self._blank)
            return
        self._blank()
        b, count = self._buffers, self._wide
        for number, layer in enumerate(self._weights.layers):
            if layer is not None:
                self._attention(number, layer, slice(0, count))
                if layer.ffn is not None:
                    self._neurons_of(layer.ffn, b.x[:count], b.normed[:count])
        if self._stream is not None:
            number = next(iter(self._cold))
            self._stream.begin({number: 0})
            for view in self._stream.layer(number):
                self._neurons_of(view, b.x[:count], b.normed[:count])
            residual_norm(b.x[:count], None, None, self._eps, None, self._sums[None, :count])
        self._wait()

    def _blank(self) -> None:
        """Tokens in the buffers that are not kept."""
        self._buffers.positions.fill_(~0)
        self._buffers.table.zero_()
        self._buffers.x.zero_()

    def _all_here(self, size: int) -> None:
        self._layers(size, {})

    def _pieces(self, count: int) -> list[Piece]:
        """A prompt of `count` tokens in what goes through the layers at once, for which all is then there."""
        if self._graphs is not None:
            found = pieces_of(count, self._graphs.sizes)
            for piece in found:
                self._graphs.capture(piece.size, self._all_here, self._blank)
            return found
        starts = range(0, count, self._chunk)
        return [Piece(slice(at, min(at + self._chunk, count)), min(self._chunk, count - at)) for at in starts]

    def _rows_for(self, number: int) -> int:
        """Where in the host's buffers a piece begins: they have room for some small ones, which are prepared while the
        GPU computes those before."""
        room = 1 if self._graphs is None else self._chunk // self._wide
        if number % room == 0:
            self._wait()
        return number % room * self._wide

    def _turn(self, length: int) -> None:
        """Cosines and sines for a text of `length` tokens, of RoPEs that depend on it."""
        self._length = length
        for number, (spec, given) in enumerate(zip(self._model.ropes, self._given, strict=True)):
            if spec.follows_length:
                own, count = self._buffers.rotations[: 2 * given[0].shape[0]].chunk(2), min(length, given[0].shape[0])
                found = rotation(spec, self._model.spec.head_dim, torch.arange(count), length)
                for target, angles in zip(own, found, strict=True):
                    target[:count].copy_(angles)
                self._rotations[number] = (own[0], own[1])

    def _begin(self, tokens: Sequence[int], size: int, at: int) -> None:
        """Bring a piece to x and positions, through rows of the host's buffers from `at` on; it is filled up to `size`
        by tokens of its last position, which are not kept."""
        count, start = len(tokens), self._cache.length
        places = self._places[at : at + size]
        places.numpy()[:] = ~(start + count - 1)
        places.numpy()[:count] = np.arange(start, start + count)
        self._buffers.positions[:size].copy_(places, non_blocking=True)
        with torch_threads(self._runtime.pool.threads):
            self._to_device(self._model.embed(np.array(tokens), start), self._buffers.x, at)

    def _shared_out(self, count: int) -> dict[int, int]:
        """How many of a layer's first cold neurons the CPU is to compute, of each layer that has some; the others'
        stream begins."""
        if self.cpu_share is None:
            by_cpu = {n: self._split(count, self._cache.length, n) for n in self._cold}
        else:
            by_cpu = {n: round(self.cpu_share * cold) for n, cold in self._cold.items()}
        if self._stream is not None:
            self._stream.begin({n: first for n, first in by_cpu.items() if first < self._cold[n]})
        return by_cpu

    def _layers(self, count: int, by_cpu: Mapping[int, int]) -> None:
        """All layers for the tokens in x, which then holds what the final norm takes."""
        for number, layer in enumerate(self._weights.layers):
            if layer is None:
                self._layer_on_cpu(number, count, self._cache.length)
                continue
            x, ahead = self._buffers.x[:count], self._buffers.ahead[:count]
            if self._model.spec.parallel:  # before attention adds to what both of them take
                residual_norm(x, layer.ffn_norm.weight, layer.ffn_norm.bias, self._eps, ahead)
            for part in pieces(count, self._wide):
                self._attention(number, layer, part)
            if not self._model.spec.parallel:
                residual_norm(x, layer.ffn_norm.weight, layer.ffn_norm.bias, self._eps, ahead)
            self._ffn(number, layer, ahead, by_cpu.get(number, 0))

    def _attention(self, number: int, layer: GpuLayer, part: slice) -> None:
        """x += attention of its norm, for some tokens of the chunk."""
        b, spec, count = self._buffers, self._model.spec, part.stop - part.start
        x, normed, qkv, attended = b.x[part], b.normed[part], b.qkv[:count], b.attended[:count]
        norm = self._weights.norms[number]
        residual_norm(x, norm.weight, norm.bias, self._eps, normed)
        self._gemm.project(normed, layer.qkv, layer.qkv_bias, qkv)
        cos, sin = self._rotations[layer.rope] if self._rotations else (None, None)
        norms = normed_heads(qkv, layer, spec, self._eps)
        rope(
            qkv, cos, sin, norms.q, norms.k, self._eps, b.positions[part], b.table.expand(count, -1), layer.cache,
            spec.n_heads, norms.q_bias, norms.k_bias, layer.scales,
        )  # fmt: skip
        queries = qkv.unflatten(1, (-1, spec.head_dim))[:, : spec.n_heads]
        window, scales = layer.window, layer.scales
        prompt_attention(queries, layer.cache, b.table, b.positions[part], window, attended, scales, self._terms)
        if layer.attention_post is None:
            self._gemm.project(attended, layer.out, layer.out_bias, x, add=True)
        else:
            self._gemm.project(attended, layer.out, layer.out_bias, normed)
            self._add_norm(normed, layer.attention_post, x)

    def _add_norm(self, values: torch.Tensor, norm: GpuNorm, x: torch.Tensor) -> None:
        """x += the norm of values, in whose place it is."""
        residual_norm(values, norm.weight, norm.bias, self._eps, values)
        x += values

    def _ffn(self, number: int, layer: GpuLayer, normed: torch.Tensor, by_cpu: int) -> None:
        """x += FFN of `normed`, which is then used up; the first `by_cpu` cold neurons by the CPU, once all is asked of
        the GPU."""
        b, count, ffn = self._buffers, len(normed), self._model.ffns[number]
        x = b.x[:count]
        if layer.ffn_post is not None:
            x = b.added[:count].zero_()
        given = self._to_host(normed) if by_cpu else None
        if layer.ffn is not None:
            self._neurons_of(layer.ffn, x, normed)
        if layer.down_bias is not None:
            x += layer.down_bias
        if self._stream is not None:
            self.counters.streamed += by_cpu < self._cold.get(number, 0)
            for view in self._stream.layer(number):
                self._neurons_of(view, x, normed)
        if given is not None:
            self.counters.computed += 1
            found = ffn.every(given.wait(), ffn.hot, ffn.hot + by_cpu, self._sums[:count])
            # A kernel reads them where they lie: a copy would wait in its engine behind pieces of rows.
            residual_norm(x, None, None, self._eps, None, found[None])
        if layer.ffn_post is not None:
            self._add_norm(x, layer.ffn_post, b.x[:count])

    def _neurons_of(self, view: DeviceFFNView, x: torch.Tensor, normed: torch.Tensor) -> None:
        """x += all these neurons for normed."""
        for part in pieces(x.shape[0], self._wide):
            self._gemm.add_ffn(normed[part], view, x[part])

    def _layer_on_cpu(self, number: int, count: int, start: int) -> None:
        """The whole layer by the CPU's own block and its KV cache, for some tokens at a time."""
        self.counters.on_cpu += 1
        x = self._to_host(self._buffers.x[:count]).wait()
        for part in pieces(count, self._wide):
            cache = copy(self._cache)  # the same keys and values, of which this part's follow
            cache.length = start + part.start
            rotations = self._model.rotations(torch.arange(cache.length, start + part.stop), self._length)
            x[part] = self._model.blocks[number](x[part], rotations, cache)
        self._buffers.x[:count].copy_(x, non_blocking=True)

    def _logits(self, some: slice) -> torch.Tensor:
        """Logits [t, vocab] on the CPU after some of the chunk's tokens."""
        b, norm, head = self._buffers, self._weights.norms[-1], self._weights.head
        normed = b.normed[some]
        residual_norm(b.x[some], norm.weight, norm.bias, self._eps, normed)
        if head is None:
            return self._model.logits(self._to_host(normed).wait())
        found = torch.empty(len(normed), self._model.spec.vocab_size)
        for part in (slice(at, at + len(self._out)) for at in range(0, len(normed), len(self._out))):
            out = self._out[: len(normed[part])]
            gemv(head, normed[part], None, out)
            found[part] = out
        return self._model.capped(found)

    def _to_device(self, values: torch.Tensor, target: torch.Tensor, at: int = 0) -> None:
        """Copy rows to the first ones of `target`, through the host's from `at` on, which no copy may be using."""
        host = self._host[at : at + values.shape[0]]
        host.copy_(values)
        target[: values.shape[0]].copy_(host, non_blocking=True)

    def _to_host(self, values: torch.Tensor) -> _OnHost:
        """Start to copy rows to the host; a buffer that the next copy overwrites."""
        host = self._host[: values.shape[0]]
        host.copy_(values, non_blocking=True)
        if not values.is_cuda:
            return _OnHost(host, None)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return _OnHost(host, done)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
