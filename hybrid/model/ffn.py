"""`HybridFFN`: one layer's FFN for many tokens at once: prefill, profiling, evaluation.

Strategies (PowerInfer, SOSP'24, for `learned`; gate-first skipping for `exact`):
  dense      every neuron is computed: the truth that the others are held against;
  exact      every gate (or up, where there is no gate) is computed, neurons that came out 0 end there: no loss;
  learned    a low-rank predictor names the neurons that will fire, and only those are computed;
  certified  copies of the gates in 8 bits prove of most neurons that they come out 0, the others are computed: no loss;
  proxy      where no activation is 0, copies of gate and up in 4 bits say what each neuron would add, and those that
             would add little are left out.

Prefill is dense whatever the strategy, as nearly every neuron fires for some token of a prompt. The strategy is used
where `FFNRuntime.as_decode` is set, by evaluation for every token; an answer's tokens take the compiled step, which
computes the same (`hybrid.runtime.cpu_step`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from cpu_kernels.certificate import CertificateView, name_tokens
from cpu_kernels.contract import MAX_BATCH, Precision
from cpu_kernels.dense_ffn import dense_ffn
from cpu_kernels.gemm import GemmScratch
from cpu_kernels.low_rank import PredictorView, predict_tokens
from cpu_kernels.matrix import Matrix
from cpu_kernels.prompt_attention import PromptScratch
from cpu_kernels.proxy import ProxyView, passing_of_tokens
from cpu_kernels.sparse_ffn import FFNView, SparseFFNScratch, sparse_ffn
from cpu_kernels.worker_pool import WorkerPool
from predictor.low_rank import LowRankPredictor
from predictor.proxy import LayerProxy
from predictor.row_copies import LayerCopies
from profiler.common.spec import Strategy


@dataclass
class FFNCounters:
    """Sums over layers and decode steps since they were reset: neurons, and seconds of wall clock. `union`: of those
    whose weights were read for some row of a step; the others count each row for itself."""

    neurons: int = 0
    computed: int = 0
    fired: int = 0
    fired_hot: int = 0  # of `fired`; counted in decode only
    predictor_seconds: float = 0.0
    attention_seconds: float = 0.0
    ffn_seconds: float = 0.0
    head_seconds: float = 0.0
    union: int = 0
    wait_seconds: float = 0.0  # of the GPU, for the CPU's neurons


@dataclass
class FFNRuntime:
    """What all layers of an engine share: the strategy, the threads, the scratch buffers and the counters.

    as_decode: treat each token as decode does, by the strategy and its kernels; otherwise as prefill does, all of it.
    few: up to so many tokens of a prompt at once go through the kernels of decode, rather than GEMMs.
    precision: of those GEMMs.
    keep_fired: have GEMMs tell `HybridFFN.act` which activations were not 0, for a profiler.
    """

    strategy: Strategy
    pool: WorkerPool
    d_model: int
    d_ff: int
    as_decode: bool = False
    few: int = 0
    precision: Precision = "precise"
    keep_fired: bool = False
    counters: FFNCounters = field(default_factory=FFNCounters)

    def __post_init__(self) -> None:
        self.scratch = SparseFFNScratch(self.d_model, self.d_ff, self.pool.threads)
        self.gemm = GemmScratch(self.pool.threads, self.precision)
        self.attention = PromptScratch(self.pool.threads)


@dataclass(frozen=True, eq=False)
class FFNMatrices:
    """One layer's neurons as the runtime has them: gate, up and down (transposed) [f, d], biases f32; neuron-major."""

    gate: Matrix | None
    up: Matrix
    down: Matrix
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class Activation(nn.Module):
    """The activation's name, as a module that a profiler can hook: which neurons fire for which token passes by."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, fired: torch.Tensor) -> torch.Tensor:
        """bool [t, neurons]: where the activation of gate, or of up where there is no gate, is not 0; of dReLU its
        product with that of up."""
        return fired


class HybridFFN(nn.Module):
    """FFN of one layer. Neurons lie in the placement's order, the first `hot` of them owned by the hot device."""

    def __init__(
        self,
        matrices: FFNMatrices,
        activation: str,
        hot: int,
        predictor: LowRankPredictor | PredictorView | None,
        runtime: FFNRuntime,
    ) -> None:
        super().__init__()
        self.matrices, self.hot, self.runtime = matrices, hot, runtime
        self.gate, self.up, self.down = matrices.gate, matrices.up, matrices.down
        self.act = Activation(activation)
        self.view = FFNView.of(self.gate, self.up, self.down, matrices.gate_bias, matrices.up_bias, activation)
        neurons = self.up.shape[0]
        self._all = np.arange(neurons, dtype=np.int32)
        self.certificate: CertificateView | None = None
        self.proxy: ProxyView | None = None
        self.set_predictor(predictor)

    def set_copies(self, copies: LayerCopies | None) -> None:
        """Certify neurons by `copies`, which must lie in this FFN's order and have bounds, from the next token on."""
        if copies is None:
            self.certificate = None
            return
        if self.up.kind.layout.in_blocks:
            raise ValueError(f"rows of {self.up.dtype} have no certificates; the plan runs them as exact")
        assert copies.slope is not None and copies.rest is not None
        bias = self.view.up_bias if self.gate is None else self.view.gate_bias
        given = copies.slope, copies.rest, bias, self.act.name, copies.deciding.columns
        self.certificate = CertificateView(copies.deciding.rows, *given)

    def set_proxy(self, proxy: LayerProxy | None) -> None:
        """Name neurons by `proxy`, which must lie in this FFN's order, from the next token on."""
        self.proxy = None
        if proxy is not None:
            assert proxy.copies.up is not None
            biases = (bias if bias.size else None for bias in (self.view.gate_bias, self.view.up_bias))
            lengths, threshold = np.ascontiguousarray(proxy.lengths), np.float32(proxy.threshold)
            self.proxy = ProxyView(proxy.copies.gate, proxy.copies.up, lengths, threshold, self.act.name, *biases)

    def set_predictor(self, predictor: LowRankPredictor | PredictorView | None) -> None:
        """Use `predictor`, whose neurons must lie in this FFN's order, from the next token on."""
        if isinstance(predictor, LowRankPredictor):
            p = predictor
            predictor = PredictorView.of(p.fc1, p.fc1_scale, p.b1, p.fc2, p.fc2_scale, p.b2, p.threshold)
        self.predictor = predictor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [t, d] f32 after the norm; returns [t, d] f32."""
        if not self.runtime.as_decode:
            return self._biased(self.every(x))
        return self._biased(self._sparse(x, *self._select(x)))

    def every(
        self, x: torch.Tensor, first: int = 0, stop: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All neurons [first, stop), by default the last ones, for x [t, d], as prefill computes them, without the bias
        of down: [t, d] f32, where it is given `out`, contiguous and none of x."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        stop = self._all.size if stop is None else stop
        few = x.shape[0] <= self.runtime.few
        (self._all_of_few if few else self._gemm)(x, first, stop, out)
        return out

    def _select(self, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The neurons to compute: ids in placement order, token after token, and each token's offsets."""
        tokens = x.shape[0]
        if self.runtime.strategy == "certified":
            if self.certificate is None:
                raise RuntimeError("strategy certified needs copies of rows; the engine checks this when it loads")
            return name_tokens(self.certificate, x.numpy(), self.runtime.pool)
        if self.runtime.strategy == "proxy":
            if self.proxy is None:
                raise RuntimeError("strategy proxy needs copies and thresholds; the engine checks this when it loads")
            return passing_of_tokens(self.proxy, x.numpy(), self.runtime.pool)
        if self.runtime.strategy != "learned":
            rows = self._all if tokens == 1 else np.tile(self._all, tokens)
            return rows, np.arange(tokens + 1, dtype=np.int64) * self._all.size
        if self.predictor is None:
            raise RuntimeError("strategy learned needs a predictor; the engine checks this when it loads")
        return predict_tokens(self.predictor, x.numpy(), self.runtime.pool)

    def _sparse(self, x: torch.Tensor, rows: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        """Each token's chosen neurons, by the kernels of decode."""
        counters, runtime, out = self.runtime.counters, self.runtime, np.zeros(tuple(x.shape), np.float32)
        skip = runtime.strategy != "dense"
        fired = sparse_ffn(self.view, x.numpy(), rows, offsets, out, runtime.scratch, runtime.pool, skip)
        counters.neurons += x.shape[0] * self._all.size
        counters.fired += fired
        counters.computed += fired if runtime.strategy == "exact" else rows.size
        return torch.from_numpy(out)

    def _all_of_few(self, x: torch.Tensor, first: int, stop: int, out: torch.Tensor) -> None:
        """Neurons [first, stop) for a few tokens, by the kernels; a neuron that comes out 0 is left there."""
        given, sums, neurons = np.ascontiguousarray(x.numpy()), out.zero_().numpy(), self._all[first:stop]
        for start in range(0, len(sums), MAX_BATCH):
            few = slice(start, start + MAX_BATCH)
            count = len(sums[few])
            offsets = np.arange(count + 1, dtype=np.int64) * neurons.size
            rows = neurons if count == 1 else np.tile(neurons, count)
            sparse_ffn(self.view, given[few], rows, offsets, sums[few], self.runtime.scratch, self.runtime.pool)

    def _gemm(self, x: torch.Tensor, first: int, stop: int, out: torch.Tensor) -> None:
        """Neurons [first, stop) for several tokens."""
        given, sums, runtime = np.ascontiguousarray(x.numpy()), out.numpy(), self.runtime
        fired = torch.empty(x.shape[0], self._all.size, dtype=torch.bool) if runtime.keep_fired else None
        told = None if fired is None else fired.numpy()
        dense_ffn(self.view, given, sums, runtime.pool, runtime.gemm, first, stop, told)
        if fired is not None:
            self.act(fired[:, first:stop])

    def _biased(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.matrices.down_bias is None else out + self.matrices.down_bias
