"""Prefill: how the cold neurons of a layer are best computed for many tokens at once.

On the CPU, or streamed: their rows go over PCIe in pieces, through two staging buffers, while the GPU computes with the
piece before. Nearly every neuron fires for some token of a prompt, so both ways take them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from profiler.common.hardware import HardwareProfile
from profiler.common.spec import ModelSpec

KERNEL_TOKENS = 8  # that the CPU's kernels take at once, for which they read the weights
# Bytes of host memory for each weight of a GEMM: it is widened to f32, written and read again.
_WIDENED_BYTES = 8


@dataclass(frozen=True)
class ColdPrefill:
    """Seconds of a layer's FFN for a chunk of tokens, by the way that its cold neurons are computed.

    `cold` and `hot` are counts of neurons; hot ones are the GPU's and keep it busy meanwhile.
    """

    hardware: HardwareProfile
    spec: ModelSpec

    def cpu_seconds(self, tokens: int, cold: int, hot: int = 0) -> float:
        """Cold neurons on the CPU, by the faster of its kernels and GEMMs, beside the hot ones on the GPU."""
        if not cold:
            return self._gpu_seconds(tokens, hot)
        hardware, read = self.hardware, cold * self.spec.neuron_bytes
        weights = cold * self.spec.rows_per_neuron * self.spec.d_model
        products = 2.0 * tokens * weights / hardware.cpu_gemm_flops
        kernels = max(math.ceil(tokens / KERNEL_TOKENS) * read / hardware.cpu_read_bandwidth, products)
        gemm = (read + _WIDENED_BYTES * weights) / hardware.cpu_read_bandwidth + products
        return max(min(kernels, gemm) + self._exchange_seconds(tokens), self._gpu_seconds(tokens, hot))

    def stream_seconds(self, tokens: int, cold: int, hot: int = 0) -> float:
        """Cold neurons sent to the GPU, which computes all of them; infinite without a GPU."""
        if not self.hardware.has_gpu:
            return math.inf
        sent = cold * self.spec.neuron_bytes / self.hardware.pcie_bandwidth
        return max(sent, self._gpu_seconds(tokens, cold + hot))

    def stream_is_cheaper(self, tokens: int, cold: int, hot: int = 0) -> bool:
        """Whether to stream a layer's `cold` neurons for `tokens` tokens, rather than to compute them on the CPU."""
        return self.stream_seconds(tokens, cold, hot) < self.cpu_seconds(tokens, cold, hot)

    def seconds(self, tokens: int, cold: int, hot: int = 0) -> float:
        """The FFN of a layer by the cheaper way."""
        return min(self.stream_seconds(tokens, cold, hot), self.cpu_seconds(tokens, cold, hot))

    def _gpu_seconds(self, tokens: int, neurons: int) -> float:
        """The GPU's GEMMs over so many neurons, or reading their rows; 0 without a GPU."""
        if not self.hardware.has_gpu:
            return 0.0
        flops = 2.0 * tokens * neurons * self.spec.rows_per_neuron * self.spec.d_model
        read = neurons * self.spec.neuron_bytes / self.hardware.gpu_read_bandwidth
        return max(flops / self.hardware.gpu_gemm_flops, read)

    def _exchange_seconds(self, tokens: int) -> float:
        """The FFN's inputs to the host and its sums back; 0 without a GPU."""
        if not self.hardware.has_gpu:
            return 0.0
        vectors = 4 * tokens * self.spec.d_model
        both = vectors / self.hardware.host_bandwidth + vectors / self.hardware.pcie_bandwidth
        return self.hardware.handoff_seconds + both
