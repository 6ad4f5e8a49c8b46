"""The model that `make_synthetic.py` writes: a ReGLU Llama whose firing rates and predictors are known by construction.

* Residual coordinate 0 is the same for every token, as no matrix writes to it. After RMSNorm it is a positive x0, so
  column 0 of the gate acts as a bias, which sets each neuron's firing rate. No other matrix reads it.
* The rest of the gate has low rank: gate = s (A B + c q e0^T) with B of -1 and 1, 7 entries of -1 or 1 in each row of A
  and otherwise zeros, q int8, s and c powers of two. So relu([B x; -B x; c x0]) followed by s [A, -A, q] is the gate,
  exactly, with int8 weights.
* The entries of A B are whole numbers from -7 to 7, and B spares the first 32 columns, so that the bias has its block
  of 32 to itself: the gate is exact in bf16, f16 and in blocks of int8 and int4, where a block of whole numbers up to 7
  times a power of two is stored without error, and so is a block with a single weight, q s c over -8 or a power of two.
* Random tokens run through the layers as they are made. Half of them set q and the sizes of what is written to the
  residual; the other half measures what came of it.

Only one layer's matrices are in memory at a time. The same seed gives the same model on the same kind of device; CPU
and CUDA draw different numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, rms_norm, scaled_dot_product_attention

from cpu_kernels.activations import activate_ref
from cpu_kernels.blocks import FORMATS
from cpu_kernels.contract import BLOCK, LAYOUTS
from hybrid.model.rope import rope_frequencies
from predictor.low_rank import LowRankPredictor
from predictor.quality import Counts
from profiler.common.errors import InputError
from profiler.common.spec import RopeSpec

TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NORM_EPS = 1e-5
N_BYTE_TOKENS = 256
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
# Rates down to 1/1024 can be set; the time to run so many tokens is small beside that of drawing the weights.
CALIBRATION_TOKENS, WINDOW = 1024, 128
SAMPLE_TOKENS = 256
# Entries of A B are sums of so many entries of B: the largest code of an int4 weight.
TERMS = FORMATS["int4"].largest
# Gates have a standard deviation of about 1. f32 sums move a gate or its logit by up to 5e-6 (d=4096). Activations
# rounded to 16 bits in blocks of 32 move a gate by up to 1.3e-4 and its logit by 2.3e-3: the largest q, 127, weighs
# c x0, which is rounded together with values of up to 250. The rest is room; at 10% firing it predicts 1.5% more
# neurons than fire.
THRESHOLD = -0.01
LOGIT_STD = 3.0  # flat enough to sample from, far enough apart that rounding does not change the greedy token
QK_STD = math.sqrt(2.0)  # of query and key elements: attention scores then have a standard deviation of 2


@dataclass(frozen=True)
class SyntheticConfig:
    """Shape and firing of the model. Raises `InputError` on a value that makes no sense.

    kv_heads: by default as many as heads. predictor_rank: hidden units of each predictor, by default d_model / 8.
    firing_share: mean share of neurons that fire for a token; with silu, whose neurons all do, that pass their layer's
    threshold. skew: rates are proportional to (rank + 10)^-skew.
    """

    d_model: int = 2048
    d_ff: int = 8192
    layers: int = 16
    heads: int = 16
    kv_heads: int | None = None
    vocab: int = 32000
    dtype: str = "bf16"
    context: int = 2048
    seed: int = 0
    firing_share: float = 0.1
    skew: float = 0.7
    predictor_rank: int | None = None
    activation: str = "relu"

    def __post_init__(self) -> None:
        for name, least in {"d_ff": 1, "layers": 1, "heads": 1, "context": 16, "seed": 0}.items():
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        good = self.d_model % (2 * self.heads) == 0 and self.d_model > BLOCK
        self._check("d_model", good, f"a multiple of twice the heads above {BLOCK}")
        self._check("kv_heads", self.n_kv_heads > 0 == self.heads % self.n_kv_heads, "a divisor of the heads")
        least = N_BYTE_TOKENS + len(SPECIAL_TOKENS)
        self._check("vocab", self.vocab >= least, f"at least {least}: every byte and the special tokens")
        self._check("dtype", self.dtype in TORCH_DTYPES, f"one of {', '.join(TORCH_DTYPES)}")
        self._check("activation", self.activation in ("relu", "silu"), "relu or silu")
        self._check("firing_share", 0.005 <= self.firing_share <= 0.9, "0.005 to 0.9")
        self._check("skew", 0 <= self.skew <= 3, "0 to 3")
        self._check("predictor_rank", self.rank >= 3, "at least 3")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InputError(
                f"{name} is {getattr(self, name)}, expected {expected}; correct --{name.replace('_', '-')}"
            )

    @property
    def n_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def rank(self) -> int:
        return max(3, self.d_model // 8) if self.predictor_rank is None else self.predictor_rank

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights; every matrix and norm has d_model rows or columns."""
        per_layer = 2 * self.d_model + 2 * self.n_kv_heads * self.head_dim + 3 * self.d_ff + 2
        return self.d_model * (self.layers * per_layer + 2 * self.vocab + 1) * LAYOUTS[self.dtype].bits // 8


def designed_rates(config: SyntheticConfig, tokens: int) -> np.ndarray:
    """Firing rates float64 [d_ff], highest first, whose mean is the share asked for.

    They follow the power law as far as `tokens` can show a rate: none is below 1/tokens or above 1 - 1/tokens.
    """
    law = (np.arange(config.d_ff) + 10.0) ** -config.skew
    low, high = 1 / tokens, 1 - 1 / tokens

    def excess(log_scale: float) -> float:
        return float(np.clip(np.exp(log_scale) * law, low, high).mean()) - config.firing_share

    scale = np.exp(brentq(excess, math.log(low / law.max()), math.log(high / law.min())))
    return np.clip(scale * law, low, high)


def bias_for_rates(gate: Tensor, x0: Tensor, rates: Tensor) -> Tensor:
    """b [f] such that gate + b x0 is positive for the share rates [f] of the tokens; gate [t, f], x0 [t] above 0."""
    ratio = (gate / x0[:, None]).sort(dim=0, descending=True).values
    count = (rates * len(gate)).round().long().clamp(1, len(gate) - 1)[None]
    return -(ratio.gather(0, count - 1) + ratio.gather(0, count))[0] / 2


def exact_gate(
    places: Tensor, signs: Tensor, b: Tensor, rank: int, x: Tensor, rates: Tensor
) -> tuple[Tensor, LowRankPredictor]:
    """A gate matrix f32 [f, d] that fires at `rates` [f] over x [t, d], and its exact predictor, on the device of x.

    places, signs: [f, n], the columns and the values, -1 or 1, of the nonzero entries of A, at most 7 a row.
    b: [k, d] of -1 and 1, but 0 in columns 0 to 31; 2 k + 1 <= rank, units beyond that are zero.
    """
    (f, terms), (k, d) = places.shape, b.shape
    a = b.new_zeros(f, k).scatter_(1, places, signs)
    scale = 2.0 ** -round(math.log2(terms * (d - BLOCK)) / 2)  # gates then have a standard deviation of about 1
    bias = bias_for_rates(linear(linear(x, b), a) * scale, x[:, 0], rates)
    step = 2.0 ** math.ceil(math.log2(float(bias.abs().max()) / (127 * scale)))
    q = (bias / (scale * step)).round()
    gate = (
        embedding_bag(places, b, per_sample_weights=signs, mode="sum") * scale
    )  # A B in a quarter of a product's time
    gate[:, 0] = scale * step * q
    fc1, fc2, fc1_scale = b.new_zeros(rank, d), b.new_zeros(f, rank), b.new_ones(rank)
    fc1[:k], fc1[k : 2 * k], fc1[2 * k, 0] = b, -b, 1
    fc2[:, :k], fc2[:, k : 2 * k], fc2[:, 2 * k] = a, -a, q
    fc1_scale[2 * k] = step
    predictor = LowRankPredictor(
        *(fc1.to(torch.int8), fc1_scale, b.new_zeros(rank)),
        *(fc2.to(torch.int8), b.new_full((f,), scale), b.new_zeros(f)),
        threshold=THRESHOLD,
    )
    return gate, predictor


def on_cpu(predictor: LowRankPredictor) -> LowRankPredictor:
    """The predictor with its tensors in host memory."""
    tensors: dict[str, Any] = {k: value.cpu() for k, value in vars(predictor).items() if isinstance(value, Tensor)}
    return replace(predictor, **tensors)


@dataclass(frozen=True)
class MeasuredLayer:
    """One layer's predictor and what was measured: firing counts int64 [f], sampled FFN inputs f16 [s, d], quality."""

    predictor: LowRankPredictor
    firings: np.ndarray
    inputs: np.ndarray
    quality: Counts


class ModelMaker:
    """Draws the matrices one after another, and runs random tokens through what is there so far.

    tokens: int64 [windows, t] on the CPU; the first half of the windows calibrates, the second measures.
    """

    def __init__(self, config: SyntheticConfig, device: str) -> None:
        self.config, self._device, self._dtype = config, device, TORCH_DTYPES[config.dtype]
        # Half the time of f32; torch has no fast bf16 product for older CPUs.
        fast = device == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
        self._in_bf16 = fast and self._dtype == torch.bfloat16
        self._generator = torch.Generator(device).manual_seed(config.seed)
        window = min(WINDOW, config.context)
        shape = (2 * max(2, CALIBRATION_TOKENS // window), window)
        self.tokens = self._integers(len(SPECIAL_TOKENS), config.vocab, shape).cpu()
        self._residual = torch.empty(0)
        self._rates = torch.from_numpy(designed_rates(config, self.tokens.numel() // 2)).to(device, torch.float32)
        frequencies = rope_frequencies(RopeSpec(), config.head_dim)
        self._angles = torch.outer(torch.arange(window).float(), frequencies).to(device)

    @property
    def sampled(self) -> np.ndarray:
        """Which of the measured tokens' FFN inputs are kept, evenly spread."""
        measured = self.tokens.numel() // 2
        return np.linspace(0, measured - 1, min(SAMPLE_TOKENS, measured)).astype(np.int64)

    def ends(self) -> dict[str, Tensor]:
        """Embedding, final norm and head. Special tokens have the logit 0: greedy text never has one, nor ends."""
        d = self.config.d_model
        embedding = self._normal(self.config.vocab, d, 1.0)
        # Large enough that the biases are near the gate's other weights in size, with 6% of the residual's energy.
        embedding[:, 0] = math.sqrt(d) / 4
        self._residual = embedding[self.tokens.to(self._device)].float()
        head = self._reading(self.config.vocab, LOGIT_STD / math.sqrt(d))
        head[: len(SPECIAL_TOKENS)] = 0
        return {"model.embed_tokens.weight": embedding, "model.norm.weight": self._ones(), "lm_head.weight": head}

    def layer(self, number: int) -> tuple[dict[str, Tensor], MeasuredLayer]:
        """The tensors of the next layer, by name, and what was measured of it."""
        norms = {"input_layernorm": self._ones(), "post_attention_layernorm": self._ones()}
        attention = self._attention()
        ffn, measured = self._ffn()
        parts = norms | attention | ffn
        return {f"model.layers.{number}.{name}.weight": tensor for name, tensor in parts.items()}, measured

    def _attention(self) -> dict[str, Tensor]:
        config, x = self.config, self._normed()
        q_std = QK_STD / math.sqrt(config.d_model)
        rows = {"q": config.heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
        stds = {"q": q_std, "k": q_std, "v": 1 / math.sqrt(config.d_model)}
        weights = {name: self._reading(count * config.head_dim, stds[name]) for name, count in rows.items()}
        q, k, v = (
            self._product(x, weight).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for weight in weights.values()
        )
        y = scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=True, enable_gqa=True)
        weights["o"] = self._written(y.transpose(1, 2).flatten(2))
        return {f"self_attn.{name}_proj": weight for name, weight in weights.items()}

    def _ffn(self) -> tuple[dict[str, Tensor], MeasuredLayer]:
        config, x = self.config, self._normed()
        calibration, measured = x.flatten(0, 1).chunk(2)
        gate, predictor = exact_gate(*self._signs(), config.rank, calibration, self._shuffled_rates())
        weights = {"gate": gate.to(self._dtype), "up": self._reading(config.d_ff, 1 / math.sqrt(config.d_model))}
        gates = torch.cat((predictor.logits(calibration), linear(measured, gate)))  # the same, and the first is cheaper
        fired = gates[len(calibration) :] > 0
        hidden = activate_ref(config.activation, gates).view(*x.shape[:2], -1).mul_(self._product(x, weights["up"]))
        weights["down"] = self._written(hidden)
        mass = hidden.flatten(0, 1)[len(calibration) :].abs() * weights["down"].float().norm(dim=0)
        quality = count_quality(predictor.mask(measured), fired, mass)
        inputs = measured[self.sampled].half().cpu().numpy()
        result = MeasuredLayer(on_cpu(predictor), fired.sum(dim=0).cpu().numpy(), inputs, quality)
        return {f"mlp.{name}_proj": weight for name, weight in weights.items()}, result

    def _signs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places and signs of A's nonzero entries [f, n], and B [k, d]."""
        config = self.config
        k = (config.rank - 1) // 2
        draw = torch.rand(config.d_ff, k, generator=self._generator, device=self._device)
        places = draw.topk(min(TERMS, k)).indices
        signs, b = (self._integers(0, 2, shape).float() * 2 - 1 for shape in (tuple(places.shape), (k, config.d_model)))
        b[:, :BLOCK] = 0
        return places, signs, b

    def _shuffled_rates(self) -> Tensor:
        return self._rates[torch.randperm(len(self._rates), generator=self._generator, device=self._device)]

    def _normed(self) -> Tensor:
        return rms_norm(self._residual, self._residual.shape[-1:], None, NORM_EPS)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T in f32, with x rounded to bf16 where that is faster; not for gates, which must be exact."""
        return linear(x.bfloat16(), weight).float() if self._in_bf16 else linear(x, weight.float())

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary position embedding, half-split layout; x: [windows, heads, t, head_dim]."""
        cos, sin = self._angles.cos(), self._angles.sin()
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def _written(self, source: Tensor) -> Tensor:
        """A matrix [d, n] that adds source [windows, t, n] to the residual, of which it spares coordinate 0.

        All such writes together come to the energy of the embedding, each to the same part of it.
        """
        energy = float(source.square().sum(dim=-1).mean())
        weight = self._normal(self.config.d_model, source.shape[-1], math.sqrt(0.5 / self.config.layers / energy))
        weight[0] = 0
        self._residual += self._product(source, weight)
        return weight

    def _reading(self, rows: int, std: float) -> Tensor:
        """A random matrix [rows, d] that does not see coordinate 0."""
        weight = self._normal(rows, self.config.d_model, std)
        weight[:, 0] = 0
        return weight

    def _normal(self, rows: int, columns: int, std: float) -> Tensor:
        values = torch.randn(rows, columns, generator=self._generator, device=self._device)
        return values.mul_(std).to(self._dtype)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self._device)

    def _ones(self) -> Tensor:
        return torch.ones(self.config.d_model, dtype=self._dtype)


def count_quality(predicted: Tensor, fired: Tensor, mass: Tensor) -> Counts:
    """Counts over bool predicted and fired [t, f] and output mass f32 [t, f]."""
    return Counts(
        pairs=fired.numel(),
        predicted=int(predicted.sum()),
        fired=int(fired.sum()),
        hits=int((predicted & fired).sum()),
        mass=float(mass.sum(dtype=torch.float64)),
        missed=float((mass * ~predicted).sum(dtype=torch.float64)),
    )
