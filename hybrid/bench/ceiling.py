"""What a decode step must read, and how long that takes at the memories' bandwidths: the ceiling of every speed.

On one device that is all bytes over its read bandwidth. On two, the hot and the cold neurons of a layer are read at the
same time and all else one after another:

    t = dense parts on the GPU / gpu + dense parts on the CPU / host + head + sum over layers of
        max(hot / gpu, hand-off + cold / host)                    without cold neurons: hot / gpu
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.model.ffn import FFNCounters
from hybrid.model.transformer import Transformer
from placement.cost import UNCERTAIN
from placement.placement import Placement
from profiler.common.spec import NAMING, Strategy


@dataclass(frozen=True)
class Machine:
    """Bytes/s that the GPU and the host's threads read, and seconds of one hand-off between them."""

    gpu_bandwidth: float
    host_bandwidth: float
    handoff_seconds: float


@dataclass(frozen=True, eq=False)
class Firing:
    """What is known beforehand of the neurons that fire.

    frequency: float64 [n_layers, d_ff] in the model's own order, None where there is no profile. predicted_ratio:
    neurons predicted over neurons that fire. uncertain: share of the silent ones that certificates name.
    """

    frequency: np.ndarray | None = None
    predicted_ratio: float = 1.0
    uncertain: float = UNCERTAIN


@dataclass(frozen=True, eq=False)
class SplitBytes:
    """Bytes of a decode step on two devices. gpu, cpu: by part, without neurons. hot, cold: float64 [n_layers], of
    neurons. handed: bool [n_layers], where the CPU has a part. head_handed: whether the head is the CPU's."""

    gpu: dict[str, int]
    cpu: dict[str, int]
    hot: np.ndarray
    cold: np.ndarray
    handed: np.ndarray
    head_handed: bool

    @property
    def parts(self) -> dict[str, int]:
        """All of it by part, those of the GPU first."""
        named = {f"GPU {part}": count for part, count in self.gpu.items()} | {"GPU hot neurons": round(self.hot.sum())}
        named |= {f"CPU {part}": count for part, count in self.cpu.items()}
        return named | {"CPU cold neurons": round(self.cold.sum())}

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values()) + round(self.hot.sum())

    @property
    def cpu_bytes(self) -> int:
        return sum(self.cpu.values()) + round(self.cold.sum())

    @property
    def handoffs(self) -> int:
        """How often a token goes to the CPU and back."""
        return int(self.handed.sum()) + self.head_handed

    def seconds(self, machine: Machine) -> float:
        """The least time of a decode step: the formula at the top."""
        hot = self.hot / machine.gpu_bandwidth
        cold = self.handed * machine.handoff_seconds + self.cold / machine.host_bandwidth
        rest = sum(self.gpu.values()) / machine.gpu_bandwidth + sum(self.cpu.values()) / machine.host_bandwidth
        return float(np.maximum(hot, cold).sum()) + rest + self.head_handed * machine.handoff_seconds


def shares(strategy: Strategy, predicted: float, fired: float) -> tuple[float, float]:
    """Share of neurons of which a strategy reads the first matrix (gate, or up where there is none), and the rest."""
    found = {"dense": (1.0, 1.0), "exact": (1.0, fired)} | dict.fromkeys(NAMING, (predicted, fired))
    return found[strategy]


def bytes_per_token(model: Transformer, strategy: Strategy, counters: FFNCounters, position: float) -> dict[str, int]:
    """Bytes that a decode step must read with `position` tokens in the KV cache, by part, at the shares in `counters`.

    Matrices outside the FFN once, a row of the embedding, norms, keys and values in f32; biases are left out as small.
    FFN: dense reads all; exact the first matrix (gate, or up where there is none) of every neuron and the rest of those
    that fire; learned and certified the first matrix of those named, and the rest of those of them that fire.
    """
    spec = model.spec
    neurons = max(1, counters.neurons)
    first, rest = shares(strategy, counters.computed / neurons, counters.fired / neurons)
    rows = spec.n_layers * spec.d_ff * model.ffns[0].up.row_bytes
    norms = (2 * spec.n_layers + 1) * spec.d_model * (1 if spec.norm == "rms" else 2)
    return {
        "attention": sum(_attention_bytes(model)),
        "keys and values": sum(_kv_bytes(model, position)),
        "predictor": sum(_naming_bytes(model, strategy)),
        "FFN": round(rows * (first + (spec.rows_per_neuron - 1) * rest)),
        "head": model.head.matrix.nbytes,
        "norms, embedding": 4 * norms + model.embedding.row_bytes,
    }


def split_bytes(
    model: Transformer, placement: Placement, strategy: Strategy, counters: FFNCounters, firing: Firing, position: float
) -> SplitBytes:
    """The same with `placement` over two devices; norms and the embedding's row are left out as small.

    `counters` say for learned and certified how many neurons were named on each side in all, which `firing` divides
    among layers and says how many of them fire; for exact, which counts none, the frequencies alone say what fires.
    """
    on_gpu, spec = placement.layer_on_gpu, model.spec
    dense = {
        "attention": np.array(_attention_bytes(model)),
        "keys and values": np.array(_kv_bytes(model, position)),
        "predictor": np.array(_naming_bytes(model, strategy)),
    }
    gpu = {part: int(sizes[on_gpu].sum()) for part, sizes in dense.items()}
    cpu = {part: int(sizes[~on_gpu].sum()) for part, sizes in dense.items()}
    gpu["head"], cpu["head"] = (
        model.head.matrix.nbytes * share for share in (placement.head_on_gpu, not placement.head_on_gpu)
    )
    hot, cold = _neuron_rows(placement, strategy, counters, firing, spec.rows_per_neuron)
    row = model.ffns[0].up.row_bytes
    handed = placement.hot < spec.d_ff
    return SplitBytes(gpu, cpu, hot * row, cold * row, handed, not placement.head_on_gpu)


def _neuron_rows(
    placement: Placement, strategy: Strategy, counters: FFNCounters, firing: Firing, per_neuron: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of hot and of cold neurons [n_layers] that a token reads."""
    is_hot = np.arange(placement.order.shape[1]) < placement.hot[:, None]
    fires = np.zeros(placement.order.shape)
    if firing.frequency is not None:
        fires = np.take_along_axis(firing.frequency, placement.order.astype(np.int64), axis=1)
    tokens = max(1.0, counters.neurons / fires.size)
    cold_count = counters.computed - counters.fired_hot
    rows = []
    for side, count in ((is_hot, counters.fired_hot), (~is_hot, cold_count)):
        neurons, fired = side.sum(axis=1).astype(float), (fires * side).sum(axis=1)
        predicted = neurons
        if strategy in ("learned", "proxy"):
            weights = fired if fired.sum() else neurons
            predicted = weights * (count / tokens / max(1e-9, weights.sum()))
            fired = predicted / firing.predicted_ratio
        elif strategy == "certified":  # those that fire, and of the silent ones as many of each
            predicted = fired + (neurons - fired) * (
                (count / tokens - fired.sum()) / max(1e-9, (neurons - fired).sum())
            )
        first, rest = (neurons, neurons) if strategy == "dense" else (predicted, fired)
        rows.append(first + (per_neuron - 1) * rest)
    return rows[0], rows[1]


def _attention_bytes(model: Transformer) -> list[int]:
    return [block.attention.qkv.matrix.nbytes + block.attention.out.matrix.nbytes for block in model.blocks]


def _kv_bytes(model: Transformer, position: float) -> list[int]:
    lengths = [min(position, block.attention.window or position) for block in model.blocks]
    return [model.spec.kv_bytes_per_layer(round(length)) for length in lengths]


def _naming_bytes(model: Transformer, strategy: Strategy) -> list[int]:
    """Of what names a layer's neurons: its predictor, its certificate or its proxy."""
    named = {"learned": "predictor", "certified": "certificate", "proxy": "proxy"}
    if strategy not in named:
        return [0] * len(model.ffns)
    found = [getattr(ffn, named[strategy]) for ffn in model.ffns]
    return [0 if by is None else by.nbytes for by in found]
