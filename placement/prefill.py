"""Prefill: how the cold neurons of a layer are best computed for many tokens at once, on a machine with a GPU.

On the CPU, or streamed: their rows go over PCIe in pieces, through two staging buffers, while the GPU computes with the
piece before; or some by the CPU while the others are streamed, so that both end together. Nearly every neuron fires for
some token of a prompt, so all ways take them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpu_kernels.contract import MAX_BATCH, Precision
from profiler.common.hardware import PRODUCT_TOKENS, HardwareProfile
from profiler.common.spec import ModelSpec

GROUP = 64  # neurons that go one way together
TERMS: dict[Precision, int] = {"precise": 3, "fast": 2}  # of 16 bits, which an f32 input of a product is split in
# Of the rate of a plain product as `hybrid hardware` measures it, what those of terms reach in a whole prompt, their
# splitting and summing counted in: a 7B layer takes 0.75 ms for 512 tokens on an H200, where 414 Gflop at 509 Tflop/s
# would be 0.81.
PRODUCT_SHARE = 1.1
# Tokens of a long prompt whose products take the CPU as long as those of one token in the kernels of decode, which few
# tokens take. On 2 cores, bf16: 0.8 and 0.19 ms.
FEW_COST = 4
# Of the host's read bandwidth, how fast pageable rows pass through pinned buffers: 16 of 120 GB/s.
_STAGED_SHARE = 0.13
# While the CPU computes, the caller launches nothing: the GPU waits for the first kernels after the CPU's part.
_RESUME_SECONDS = 1e-4
# Beside a stream the CPU's products reach this share of their rate, and a layer costs so much more, as the CPU's sums
# wait behind pieces on the same bus. With 14 threads beside an H200, 8 layers of d=4096, splits that were to take 38 ms
# for 512 tokens and 29 for 64 took 120 and 85, where streaming alone took 40 and 39.
_BESIDE_SHARE, _BESIDE_SECONDS = 0.25, 1e-3


@dataclass(frozen=True)
class ColdPrefill:
    """Seconds of a layer for a chunk of tokens, by the way that its cold neurons are computed.

    hardware: with as many CPU threads as will run, and a GPU. precision: of the products. few: up to so many tokens the
    CPU takes its kernels of decode.
    """

    hardware: HardwareProfile
    spec: ModelSpec
    precision: Precision = "precise"
    few: int = 0

    def seconds(
        self, tokens: int, hot: int, cold: int, by_cpu: int, before: float = 0.0, registered: bool = True
    ) -> float:
        """A layer with `hot` neurons on the GPU, of whose `cold` ones the CPU computes `by_cpu` and the rest is sent.

        before: what the GPU does before the FFN, while rows are sent already. registered: whether they go from where
        they lie.
        """
        streamed = cold - by_cpu
        on_gpu = before + (hot + streamed) * self._gpu_neuron_seconds(tokens)
        sent = streamed * self.spec.neuron_bytes / self._sent_bandwidth(registered)
        if not by_cpu:
            return max(on_gpu, sent)
        on_cpu = by_cpu * self.cpu_neuron_seconds(tokens, beside_pcie=streamed > 0)
        resumed = _RESUME_SECONDS + (_BESIDE_SECONDS if streamed else 0.0)
        return max(on_gpu, sent, before + self.exchange_seconds(tokens) + on_cpu) + resumed

    def by_cpu(self, tokens: int, hot: int, cold: int, before: float = 0.0, registered: bool = True) -> int:
        """How many of the cold neurons the CPU had best compute: none, all, or some groups, so that both ways end
        together. Rows that are not registered are copied by the CPU's cores, so it computes none beside them."""
        choices = [0]
        if registered:
            cpu, gpu = self.cpu_neuron_seconds(tokens, beside_pcie=True), self._gpu_neuron_seconds(tokens)
            sent = self.spec.neuron_bytes / self._sent_bandwidth(registered)
            exchange = self.exchange_seconds(tokens)
            even = max((cold * sent - before - exchange) / (cpu + sent), ((hot + cold) * gpu - exchange) / (cpu + gpu))
            groups = math.floor(even / GROUP)
            choices += [count * GROUP for count in (groups, groups + 1) if 0 < count * GROUP < cold]
        choices.append(cold)
        return min(choices, key=lambda count: self.seconds(tokens, hot, cold, count, before, registered))

    def gpu_seconds(self, tokens: int, flops: float, read: float) -> float:
        """Products of so many operations on the GPU, of weights of `read` bytes."""
        hardware = self.hardware
        if self.spec.dtype == "f32" or not hardware.gpu_tensor_flops:
            rate = hardware.gpu_gemm_flops
        else:
            rate = PRODUCT_SHARE * hardware.gpu_tensor_flops / TERMS[self.precision]
        return max(flops / rate, read / hardware.gpu_read_bandwidth)

    def cpu_seconds(self, tokens: int, weights: float, read: float, beside_pcie: bool = False) -> float:
        """Products of `tokens` tokens with so many weights, stored in `read` bytes, by all threads of the CPU.

        beside_pcie: while the GPU copies other rows of host memory.
        """
        hardware = self.hardware
        bandwidth = hardware.cpu_read_bandwidth
        if beside_pcie:
            bandwidth = max(bandwidth - hardware.pcie_bandwidth, 0.5 * bandwidth)
        precise = self.precision == "precise" or not hardware.cpu_fast_gemm_flops
        flops = hardware.cpu_gemm_flops if precise else hardware.cpu_fast_gemm_flops
        few = tokens <= self.few
        passes = math.ceil(tokens / MAX_BATCH) if few else 1
        panels = hardware.cpu_panel_tokens
        # Rates are of many tokens with their panels.
        cost = FEW_COST * tokens if few else (tokens + panels) * PRODUCT_TOKENS / (PRODUCT_TOKENS + panels)
        flops *= _BESIDE_SHARE if beside_pcie else 1.0
        return max(passes * read / bandwidth, 2.0 * cost * weights / flops)

    def cpu_neuron_seconds(self, tokens: int, beside_pcie: bool = False) -> float:
        """One neuron among many on the CPU."""
        return self.cpu_seconds(tokens, self._neuron_weights, self.spec.neuron_bytes, beside_pcie)

    def exchange_seconds(self, tokens: int) -> float:
        """The inputs of the CPU's part to the host and its sums back."""
        vectors, hardware = 4 * tokens * self.spec.d_model, self.hardware
        both = vectors / hardware.host_bandwidth + vectors / hardware.pcie_bandwidth
        return hardware.handoff_seconds + hardware.cpu_layer_seconds + both

    def _gpu_neuron_seconds(self, tokens: int) -> float:
        return self.gpu_seconds(tokens, 2.0 * tokens * self._neuron_weights, self.spec.neuron_bytes)

    def _sent_bandwidth(self, registered: bool) -> float:
        """Bytes/s of rows to the GPU."""
        staged = _STAGED_SHARE * self.hardware.cpu_read_bandwidth
        return self.hardware.pcie_bandwidth if registered else min(self.hardware.pcie_bandwidth, staged)

    @property
    def _neuron_weights(self) -> int:
        return self.spec.rows_per_neuron * self.spec.d_model
