"""`PromptTime`: the cost model's seconds to read a prompt, for a model on GPU and CPU, or on the CPU alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from placement.plan import Choice
from placement.prefill import ColdPrefill
from placement.workspace import PREFILL_CHUNK, PREFILL_WIDE, Workspace

# Kernels of a layer, three pieces of neurons in its FFN: norms, terms, products, RoPE, attention, sums.
_LAUNCHES = 26
# Python takes so long for each call of kernels, of which attention has so many for `PREFILL_WIDE` tokens, and so has a
# piece of neurons; CUDA graphs, where all is on the GPU, take none. Once a prompt: what comes before the first layer.
_CALL_SECONDS, _ATTENTION_CALLS, _PIECE_CALLS, _PROMPT_SECONDS = 34e-6, 13, 8, 2e-3
_EMBEDDED = 4  # passes over a prompt's f32 embeddings in host memory, until they are sent
# Of products with weights, the rate that the CPU's attention reaches.
_CPU_ATTENTION_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class PromptTime:
    """Seconds to read prompts under `choice`.

    registered: layers whose cold rows the GPU reads where they lie.
    """

    cost: ColdPrefill
    choice: Choice
    registered: Collection[int]

    def seconds(self, tokens: int) -> float:
        """A prompt of so many tokens, from an empty cache, and the logits after it; something is on the GPU."""
        layers = sum(
            self._chunk_seconds(min(PREFILL_CHUNK, tokens - start), start) for start in range(0, tokens, PREFILL_CHUNK)
        )
        return _PROMPT_SECONDS + layers + self._head_seconds()

    def seconds_alone(self, tokens: int, piece: int) -> float:
        """The same by the CPU alone, `piece` tokens at a time."""
        spec, hardware = self.cost.spec, self.cost.hardware
        layers = sum(
            self._layer_on_cpu(min(piece, tokens - start), start, layer)
            for start in range(0, tokens, piece)
            for layer in range(spec.n_layers)
        )
        return layers + spec.vocab_size * spec.embedding_row_bytes / hardware.cpu_read_bandwidth

    def by_cpu(self, tokens: int, start: int, layer: int) -> int:
        """How many cold neurons of a layer on the GPU the CPU had best compute of a chunk after `start` tokens."""
        hot, cold = self._neurons(layer)
        return self.cost.by_cpu(tokens, hot, cold, self._attention(tokens, start, layer), layer in self.registered)

    def _chunk_seconds(self, tokens: int, start: int) -> float:
        hardware, vectors = self.cost.hardware, 4.0 * tokens * self.cost.spec.d_model
        embedded = _EMBEDDED * vectors / hardware.cpu_read_bandwidth + vectors / hardware.pcie_bandwidth
        on_gpu = self.choice.layer_on_gpu
        return embedded + sum(
            self._layer_seconds(tokens, start, n)
            if on_gpu[n]
            else self._layer_on_cpu(tokens, start, n) + self.cost.exchange_seconds(tokens)
            for n in range(self.cost.spec.n_layers)
        )

    def _layer_seconds(self, tokens: int, start: int, layer: int) -> float:
        hot, cold = self._neurons(layer)
        before = self._attention(tokens, start, layer)
        by_cpu = self.by_cpu(tokens, start, layer)
        seconds = self.cost.seconds(tokens, hot, cold, by_cpu, before, layer in self.registered)
        return max(seconds, self._calls(tokens, hot, cold - by_cpu) * _CALL_SECONDS)

    def _calls(self, tokens: int, hot: int, streamed: int) -> int:
        """Calls that queue a layer."""
        choice, spec = self.choice, self.cost.spec
        if min(choice.hot) == spec.d_ff and all(choice.layer_on_gpu):
            return 0
        planned = Workspace(spec, tokens, 0, tokens, 1)
        pieces = -(-hot // planned.prefill_gemm.columns) + -(-streamed // planned.staging_neurons)
        return -(-tokens // PREFILL_WIDE) * (_ATTENTION_CALLS + _PIECE_CALLS * pieces)

    def _neurons(self, layer: int) -> tuple[int, int]:
        hot = int(self.choice.hot[layer])
        return hot, self.cost.spec.d_ff - hot

    def _attention(self, tokens: int, start: int, layer: int) -> float:
        """Seconds of the GPU from a layer's begin to its FFN."""
        flops, weights = self._attention_flops(tokens, start, layer), self._projections
        projections = self.cost.gpu_seconds(tokens, 2.0 * tokens * weights, self._projection_bytes)
        return projections + self.cost.gpu_seconds(tokens, flops, 0) + _LAUNCHES * self.cost.hardware.gpu_launch_seconds

    def _layer_on_cpu(self, tokens: int, start: int, layer: int) -> float:
        """Weights are read anew for every `PREFILL_WIDE` tokens."""
        cost, spec = self.cost, self.cost.spec
        precise = cost.hardware.cpu_gemm_flops
        seconds = self._attention_flops(tokens, start, layer) / (_CPU_ATTENTION_SHARE * precise)
        for at in range(0, tokens, PREFILL_WIDE):
            some = min(PREFILL_WIDE, tokens - at)
            seconds += cost.cpu_seconds(some, self._projections, self._projection_bytes)
            seconds += spec.d_ff * cost.cpu_neuron_seconds(some)
        return seconds

    def _attention_flops(self, tokens: int, start: int, layer: int) -> float:
        """Scores and sums of values, over the keys that each token sees."""
        spec, keys = self.cost.spec, start + tokens / 2
        if spec.sliding_window is not None and spec.sliding_layers[layer]:
            keys = min(keys, spec.sliding_window)
        return 4.0 * tokens * keys * spec.n_heads * spec.head_dim

    @property
    def _projections(self) -> int:
        """Weights of QKV and output."""
        spec = self.cost.spec
        return 2 * (spec.n_heads + spec.n_kv_heads) * spec.head_dim * spec.d_model

    @property
    def _projection_bytes(self) -> int:
        return self.cost.spec.layer_dense_bytes

    def _head_seconds(self) -> float:
        """The final norm and the head, for the last token."""
        spec, hardware = self.cost.spec, self.cost.hardware
        read = spec.vocab_size * spec.embedding_row_bytes
        bandwidth = hardware.gpu_read_bandwidth if self.choice.head_on_gpu else hardware.cpu_read_bandwidth
        return read / bandwidth + hardware.handoff_seconds
