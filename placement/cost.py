"""Cost model: expected seconds of one decode step for any split of a model between CPU and GPU.

Decoding one token is bound by memory, so a part takes the bytes that it reads over the bandwidth of the device
that holds it, plus fixed costs. The hot and the cold neurons of a layer run at the same time. Several rows read their
neurons once for all, and the CPU multiplies for each: dense parts take the longer of the two, a union of neurons, which
goes row by row, the one after the other. 10% of 8192 neurons of d=2048, bf16, 2 cores: 1.6, 5.0 and 8.6 ms for 4, 16
and 32 rows, where these are 1.6, 4.7 and 7.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placement.plan import Choice, VramPlan
from placement.prefill import FEW_COST
from profiler.common.errors import InputError
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import NAMING, STRATEGIES, Strategy

# Small kernels beside those that come one with each that reads weights. FFN: the sum with the residual and the next
# norm, where no hot neurons are; where neurons are predicted, compaction of their ids. The hand-off has both, as it
# begins with the latter and ends with the former.
SUM_KERNELS = 1
COMPACT_KERNELS = 1
HEAD_SMALL_KERNELS = 1  # logits to the host
# Of the read bandwidth, that layers on the CPU reach in decode: 89% on 2 cores, 88 and 92% on 16 of a shared host.
_DECODE_SHARE = 0.88
# Of the rate of other parts, that rows of int4 are named at: 33 of 44 GB/s at d=2048 on 2 cores (`gemv.py`).
_PROXY_SHARE = 0.75
# Of the rate at which bf16 neurons are read here and there, that each type reaches: rows in blocks are short.
_SCATTERED_SHARES = {"bf16": 1.0, "f16": 1.0, "f32": 1.0, "int8": 0.75, "int4": 0.4}
# Share of silent neurons that certificates leave in doubt, where it was not measured: 5% at d=2048.
UNCERTAIN = 0.05
# Bytes of bf16 that the GPU's products and sparse FFN read in the time that a byte of each type takes them.
_GPU_FACTORS = {"bf16": (1.0, 1.0), "f16": (1.0, 1.0), "f32": (1.0, 1.0), "int8": (1.4, 3.0), "int4": (1.8, 4.0)}
# Python between two tokens of a GPU's engine: choosing, text, the next token's row.
_BETWEEN_TOKENS = 80e-6
# Of PCIe's bandwidth, that kernels reach which read host memory, and of a layer's cold bytes, the most that they read.
_ZERO_COPY_SHARE, _MOST_ZERO_COPY = 0.8, 0.6


@dataclass(frozen=True)
class StepTime:
    """Expected seconds of one decode step, by part.

    `ffn` counts the slower device of each layer, `handoff` what of the hand-offs the GPU's kernels do not hide. `head`
    includes the hand-off that reaches a head on the CPU, and what a token costs beside its kernels.
    """

    attention: float
    predictor: float
    ffn: float
    handoff: float
    head: float

    @property
    def seconds(self) -> float:
        return self.attention + self.predictor + self.ffn + self.handoff + self.head

    @property
    def tokens_per_second(self) -> float:
        return 1.0 / self.seconds


@dataclass(frozen=True, eq=False)
class CostModel:
    """Expected decode time of `plan.spec` on `hardware`; raises `InputError` when the inputs do not fit together.

    firing: float64 [n_layers, d_ff], activation frequency of each neuron in 0..1.
    strategy: `dense` reads every row of a neuron. `exact` reads the first row (gate, or up where there is no gate)
    of every neuron and the others when it fires. `learned` reads the first row of the neurons predicted to fire,
    which are `predicted_ratio` times those that fire, and the others when it fires. `certified` reads copies of all
    first rows in 8 bits, the first row of those that fire and of the share `uncertain` of the silent, and the others
    when it fires. `proxy` reads copies of gate and up in 4 bits, and all rows of those that pass, which is what firing
    means there. group_size: neurons of similar frequency that are placed together. rows: of the step, each of a
    sequence of its own, so that what fires for one says nothing of the others. Placements are solved for one.

    The FFN of a layer takes max(GPU kernels, hand-off + cold neurons on the CPU), of expected times, a little below the
    expectation of the maximum; the CPU's part has the fixed `cpu_layer_seconds` and reads rows here and there.
    """

    plan: VramPlan
    hardware: HardwareProfile
    firing: np.ndarray
    strategy: Strategy
    predicted_ratio: float = 1.0
    group_size: int = 64
    rows: int = 1
    uncertain: float = UNCERTAIN

    def __post_init__(self) -> None:
        spec = self.plan.spec
        if self.firing.shape != (spec.n_layers, spec.d_ff):
            raise InputError(f"frequencies are {self.firing.shape}, this model has {(spec.n_layers, spec.d_ff)}")
        if not ((self.firing >= 0) & (self.firing <= 1)).all():
            raise InputError("activation frequencies must lie in 0..1; run: hybrid profile")
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy is {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if not self.predicted_ratio > 0 or self.group_size < 1 or self.rows < 1:
            raise InputError("predicted_ratio must be above 0, group_size and rows at least 1")
        if self.plan.proxied != (self.strategy == "proxy"):
            raise InputError("a plan has proxies where the strategy is proxy, and only there")
        if self.plan.certified != (self.strategy == "certified") or not 0 <= self.uncertain <= 1:
            raise InputError("a plan has certificates where the strategy is certified, of which 0 to 1 are uncertain")

    @cached_property
    def order(self) -> np.ndarray:
        """Neuron ids int32 [n_layers, d_ff], most often firing first; equal frequencies keep their order."""
        return np.argsort(-self.firing, axis=1, kind="stable").astype(np.int32)

    @cached_property
    def group_counts(self) -> np.ndarray:
        """Hot neurons int64 [n_groups + 1] when the first 0, 1, ... groups of a layer are hot."""
        d_ff = self.plan.spec.d_ff
        return np.append(np.arange(0, d_ff, self.group_size), d_ff)

    @property
    def union_share(self) -> float:
        """Expected share of the neurons that are read for some row, of all layers."""
        return float(self._in_union(self._needed).mean()) if self.names else 1.0

    @property
    def names(self) -> bool:
        """Whether neurons are named first, before weights are read."""
        return self.strategy in NAMING

    @property
    def _needed(self) -> np.ndarray:
        """Chance [n_layers, d_ff] that a neuron is named for a row."""
        if self.strategy == "certified":
            return self.firing + self.uncertain * (1 - self.firing)
        return np.minimum(1.0, self.firing * self.predicted_ratio)

    def _in_union(self, chance: np.ndarray) -> np.ndarray:
        """Chance of what has this chance for a row, that it is so for some row of the step."""
        return 1.0 - (1.0 - chance) ** self.rows if self.rows > 1 else chance

    @cached_property
    def _read_bytes(self) -> np.ndarray:
        """Expected bytes [n_layers, d_ff + 1] read in a step from the first 0, 1, ... neurons of `order`."""
        return self._bytes_of(self._in_union(self.firing), self._in_union(self._needed))

    @cached_property
    def _row_bytes(self) -> np.ndarray:
        """The same of one row: what it multiplies with."""
        return self._bytes_of(self.firing, self._needed)

    def _bytes_of(self, fires: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Bytes of the first 0, 1, ... neurons of `order`, where each is needed with these chances [n_layers, d_ff]."""
        spec = self.plan.spec
        fires, predicted = (np.take_along_axis(each, self.order, axis=1) for each in (fires, predicted))
        first = spec.row_bytes(spec.d_model) + spec.ffn_bias * spec.vector_element_bytes
        if self.strategy == "dense":
            per_neuron = np.full_like(fires, spec.neuron_bytes)
        elif self.strategy == "exact":
            per_neuron = first + (spec.neuron_bytes - first) * fires
        else:
            per_neuron = first * predicted + (spec.neuron_bytes - first) * fires
        return np.pad(np.cumsum(per_neuron, axis=1), ((0, 0), (1, 0)))

    def _kv_bytes(self) -> np.ndarray:
        """Bytes [n_layers] of keys and values read at the planned context; a sliding window bounds them."""
        spec, context = self.plan.spec, self.plan.context
        tokens = np.full(spec.n_layers, context)
        if spec.sliding_window is not None:
            tokens[np.array(spec.sliding_layers, dtype=bool)] = min(context, spec.sliding_window)
        return self.rows * tokens * spec.kv_bytes_per_layer(1)

    @property
    def handoff_seconds(self) -> float:
        """One hand-off with the FFN inputs to the host and the partial sums back, f32; 0 without a GPU."""
        if not self.hardware.has_gpu:
            return 0.0
        vector, hardware = self.rows * self.plan.spec.d_model * 4, self.hardware
        return hardware.handoff_seconds + vector / hardware.host_bandwidth + vector / hardware.pcie_bandwidth

    def _read_by_first(self, hot: np.ndarray) -> np.ndarray:
        """Bytes [n_layers, n] read from the first `hot` neurons (int64 [n_layers or 1, n])."""
        return _at(self._read_bytes, hot)

    def _cold_seconds(self, hot: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
        """CPU time [n_layers, n] of the neurons after the first `hot`, at `_ffn_bandwidth` where none is given."""
        read = self._read_bytes[:, -1:] - self._read_by_first(hot)
        of_a_row = self._row_bytes[:, -1:] - _at(self._row_bytes, hot)
        reading, products = read / (bandwidth or self._ffn_bandwidth), self._products(of_a_row, self._weight_bytes)
        computing = np.maximum(reading, products) if self.strategy == "dense" else reading + products
        seconds = self.hardware.cpu_layer_seconds + computing
        return np.where(hot < self.plan.spec.d_ff, seconds, 0.0)

    def _products(self, of_a_row: np.ndarray, weight: float) -> np.ndarray:
        """CPU time to multiply each row with its own bytes, of `weight` a weight; 0 for one row, which is done while it
        reads."""
        flops = 2.0 * FEW_COST * of_a_row / weight * self.rows * (self.rows > 1)
        return flops / self.hardware.cpu_gemm_flops

    @property
    def _weight_bytes(self) -> float:
        return self.plan.spec.row_bytes(self.plan.spec.d_model) / self.plan.spec.d_model

    @property
    def _ffn_bandwidth(self) -> float:
        """Bytes/s of neurons' rows in host memory: one after another where every neuron is computed."""
        if self.strategy == "dense":
            return self.hardware.cpu_read_bandwidth
        return self.hardware.scattered_bandwidth * _SCATTERED_SHARES[self.plan.spec.dtype]

    @property
    def _dense_bandwidth(self) -> float:
        """Bytes/s of the other parts in host memory, which many short phases read."""
        return _DECODE_SHARE * self.hardware.cpu_read_bandwidth

    def _hot_seconds(self, hot: np.ndarray) -> np.ndarray:
        """GPU time [n_layers, n] of the FFN of the first `hot` neurons, compaction and the next norm included."""
        launch = self.hardware.gpu_launch_seconds
        _, factor = _GPU_FACTORS[self.plan.spec.dtype]
        seconds = self.hardware.kernel_seconds("sparse_ffn", factor * self._read_by_first(hot))
        compaction = COMPACT_KERNELS * self.names * launch
        return np.where(hot > 0, seconds, SUM_KERNELS * launch) + compaction

    @cached_property
    def _gpu_attention(self) -> np.ndarray:
        """GPU time [n_layers] from the QKV projection to the norm before the FFN."""
        hardware, spec = self.hardware, self.plan.spec
        out = spec.d_model * spec.row_bytes(spec.n_heads * spec.head_dim)
        factor, _ = _GPU_FACTORS[spec.dtype]
        projections = factor * np.array([spec.layer_dense_bytes - out, out])
        fixed = float(hardware.kernel_seconds("gemv", projections).sum())
        return fixed + hardware.kernel_seconds("attention", self._kv_bytes())

    def _zero_copy_bytes(self, hot: np.ndarray, on_gpu: np.ndarray) -> np.ndarray:
        """Bytes [n_layers, n] of cold neurons that the GPU had better read over PCIe while the CPU computes the rest.

        The hottest of the cold ones; so many that both end together.
        """
        rate = self._zero_copy_bandwidth
        if not self.names or not rate:
            return np.zeros_like(on_gpu)
        on_cpu = self._cold_seconds(hot, self._ffn_beside_pcie)
        ahead = on_cpu + self.handoff_seconds - on_gpu - self._zero_copy_fixed
        wanted = ahead / (1 / self._ffn_beside_pcie + 1 / rate)
        cold = self._read_bytes[:, -1:] - self._read_by_first(hot)
        zero_copy = np.where(hot > 0, np.clip(wanted, 0, _MOST_ZERO_COPY * cold), 0.0)
        alone = self._cold_seconds(hot)
        with_zero_copy = np.maximum(*self._with_zero_copy(hot, zero_copy, on_gpu, alone, self.handoff_seconds))
        return np.where(with_zero_copy < np.maximum(on_gpu, alone + self.handoff_seconds), zero_copy, 0.0)

    def _with_zero_copy(
        self, hot: np.ndarray, zero_copy: np.ndarray, on_gpu: np.ndarray, on_cpu: np.ndarray, handoff: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """GPU and CPU time [n_layers, n] where `zero_copy` bytes go over PCIe; `handoff` is added to the CPU's."""
        beside = self._ffn_beside_pcie
        gpu = on_gpu + self._zero_copy_fixed + zero_copy / max(self._zero_copy_bandwidth, 1.0)
        cpu = self._cold_seconds(hot, beside) - zero_copy / beside
        return np.where(zero_copy > 0, gpu, on_gpu), np.where(zero_copy > 0, cpu, on_cpu) + handoff

    @property
    def _zero_copy_bandwidth(self) -> float:
        """Bytes/s of kernels that read host memory over PCIe."""
        return _ZERO_COPY_SHARE * self.hardware.pcie_bandwidth

    @property
    def _ffn_beside_pcie(self) -> float:
        """`_ffn_bandwidth` while kernels read host memory too: both share what it gives."""
        left = self.hardware.cpu_read_bandwidth - self._zero_copy_bandwidth
        return min(self._ffn_bandwidth, max(left, 0.5 * self._ffn_bandwidth))

    @property
    def _zero_copy_fixed(self) -> float:
        """Seconds of the sparse FFN's kernels beside what they read over PCIe."""
        return float(self.hardware.kernel_seconds("sparse_ffn", np.array(0)))

    def zero_copy(self, choice: Choice) -> np.ndarray:
        """Cold neurons int64 [n_layers], the hottest of them, that the GPU reads from host memory itself."""
        hot = choice.hot[:, None]
        wanted = self._zero_copy_bytes(hot, self._hot_seconds(hot))
        until = (self._read_by_first(hot) + wanted)[:, 0]
        stop = np.array([np.searchsorted(row, end) for row, end in zip(self._read_bytes, until, strict=True)])
        counts = np.minimum(np.maximum(stop - choice.hot, 0), self.plan.spec.d_ff - choice.hot)
        return np.where(choice.layer_on_gpu & (wanted[:, 0] > 0), counts, 0)

    def _layers_on_gpu(self, hot: np.ndarray) -> np.ndarray:
        """Attention, predictor, FFN and hand-off seconds, stacked as [4, n_layers, n], for `hot` counts [.., n]."""
        predictor = self._naming_on_gpu
        on_gpu, on_cpu = self._hot_seconds(hot), self._cold_seconds(hot)
        zero_copy = self._zero_copy_bytes(hot, on_gpu)
        on_gpu, on_cpu = self._with_zero_copy(hot, zero_copy, on_gpu, on_cpu)
        handed = on_cpu + np.where(hot < self.plan.spec.d_ff, self.handoff_seconds, 0.0)
        ffn = np.maximum(on_gpu, on_cpu)
        handoff = np.maximum(on_gpu, handed) - ffn
        parts = (self._gpu_attention[:, None], predictor[:, None], ffn, handoff)
        return np.stack([np.broadcast_to(part, ffn.shape) for part in parts])

    def _layers_on_cpu(self, handoff: float) -> np.ndarray:
        """The same four parts [4, n_layers, 1] with a whole layer on the CPU, entered through `handoff` seconds."""
        bandwidth, matrices = self._dense_bandwidth, np.array(self.plan.spec.layer_dense_bytes)
        predictors = (
            np.array(self.plan.predictor_bytes) + self.plan.copy_bytes
        )  # a byte a weight, of proxies half of one
        products = np.maximum(matrices / bandwidth, self._products(matrices, self._weight_bytes))
        attention = products + self._kv_bytes() / bandwidth
        share, weight = (_PROXY_SHARE, 0.5) if self.plan.proxied else (1.0, 1.0)
        predictor = np.maximum(predictors / (share * bandwidth), self._products(predictors, weight))
        ffn = self._cold_seconds(np.zeros((1, 1), dtype=np.int64))[:, 0]
        return np.stack([attention, predictor, ffn, np.full_like(ffn, handoff)])[:, :, None]

    @property
    def _naming_on_gpu(self) -> np.ndarray:
        """GPU time [n_layers] to name neurons, by predictors, by certificates, which are rows of int8, or by proxies,
        which are rows of int4."""
        sizes = np.array(self.plan.predictor_bytes)
        found = np.where(sizes > 0, self.hardware.kernel_seconds("predictor", sizes), 0.0)
        if not self.plan.copy_bytes:
            return found
        factor, _ = _GPU_FACTORS["int4" if self.plan.proxied else "int8"]
        return found + self.hardware.kernel_seconds("gemv", np.array(factor * self.plan.copy_bytes))

    @property
    def _token_seconds(self) -> float:
        """Seconds of a token beside its layers and head, where there is a GPU."""
        return self.hardware.token_seconds + _BETWEEN_TOKENS

    def _head_seconds(self, handoff: float) -> tuple[float, float]:
        """Head on the CPU, entered through `handoff` seconds, and head on the GPU."""
        read, hardware = self.plan.spec.head_bytes, self.hardware
        on_cpu = handoff + read / self._dense_bandwidth
        if not hardware.has_gpu:
            return on_cpu, np.inf
        factor, _ = _GPU_FACTORS[self.plan.spec.embedding_dtype or self.plan.spec.dtype]
        product = hardware.kernel_seconds("gemv", np.array(factor * read))
        on_gpu = HEAD_SMALL_KERNELS * hardware.gpu_launch_seconds + product
        return on_cpu, float(on_gpu)

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds float64 and bytes int64, both [n_layers + 1, n_groups + 2], of every option when the GPU is used.

        Option 0 is the CPU; option 1 + k of a layer is the GPU with k hot groups. The last row is the head, whose
        option 1 is the GPU; options that it lacks cost infinity. Raises `InputError` on hardware without a GPU.
        """
        self._require_gpu()
        plan, counts = self.plan, self.group_counts[None, :]
        shape = (plan.spec.n_layers + 1, counts.shape[1] + 1)
        seconds, sizes = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
        seconds[:-1, :1] = self._layers_on_cpu(self.handoff_seconds).sum(axis=0)
        seconds[:-1, 1:] = self._layers_on_gpu(counts).sum(axis=0)
        sizes[:-1, 1:] = plan.layer_bytes[:, None] + plan.hot_bytes(counts)
        seconds[-1, :2] = np.array(self._head_seconds(self.handoff_seconds)) + self._token_seconds
        sizes[-1, 1] = plan.head_bytes
        return seconds, sizes

    def evaluate(self, choice: Choice) -> StepTime:
        """Expected time of one decode step under `choice`; with nothing on the GPU there is no hand-off."""
        handoff = self.handoff_seconds if choice.uses_gpu else 0.0
        parts = self._layers_on_cpu(handoff)[:, :, 0]
        if choice.uses_gpu:
            self._require_gpu()
            parts = np.where(choice.layer_on_gpu, self._layers_on_gpu(choice.hot[:, None])[:, :, 0], parts)
        attention, predictor, ffn, layer_handoff = (float(part) for part in parts.sum(axis=1))
        head = self._head_seconds(handoff)[choice.head_on_gpu] + self._token_seconds * choice.uses_gpu
        return StepTime(attention, predictor, ffn, layer_handoff, head)

    def ffn_seconds(self, choice: Choice) -> float:
        """Seconds of a layer's FFN under `choice`, on the mean of the layers: predictor, neurons and hand-off."""
        time = self.evaluate(choice)
        return (time.predictor + time.ffn + time.handoff) / self.plan.spec.n_layers

    def _require_gpu(self) -> None:
        if not self.hardware.has_gpu:
            raise InputError(f"hardware profile {self.hardware.name} has no GPU; use a budget of 0 or another profile")


def _at(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of `sums` [n, d_ff + 1] those of the first `counts` (int64 [n or 1, m]) neurons, [n, m]."""
    return np.take_along_axis(sums, np.broadcast_to(counts, (len(sums), counts.shape[1])), axis=1)
