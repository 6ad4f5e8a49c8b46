"""`ModelSpec`: the shape and arithmetic of a model, as every step from the profiler to the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cpu_kernels.contract import LAYOUTS, DType, split_activation

QKNorm = Literal["head", "all", "head layer"]
# How keys and values are kept: `auto` is f16, or f32 where the weights are or f16 does not hold them.
KVChoice = Literal["auto", "int8"]
KV_CHOICES: tuple[KVChoice, ...] = get_args(KVChoice)
# Which neurons of an FFN are computed in decode: `hybrid.model.ffn` says what each does.
Strategy = Literal["dense", "exact", "learned", "certified", "proxy"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
# Those where something names neurons first, of which alone weights are read.
NAMING: tuple[Strategy, ...] = ("learned", "certified", "proxy")

_SPARSE_ACTIVATIONS = frozenset({"relu", "relu2", "fatrelu", "drelu"})


def fires_sparsely(activation: str) -> bool:
    """Whether an activation is exactly 0 for many inputs. Raises `ValueError` for an unknown name."""
    return split_activation(activation)[0] in _SPARSE_ACTIVATIONS


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; `hybrid.model.rope` says what each kind does, `none` turns nothing.

    turned: elements of each head that are turned, even; None for all. scale: what their cosines and sines are
    multiplied with. score_scale: what attention's scores are, beside one over the root of the head's size. low, high:
    llama3's factors of frequency, yarn's slow and fast numbers of turns, which `whole_turns` rounds to whole pairs.
    original_context: tokens that the model was first trained for. short, long: longrope's factors of each frequency.
    """

    theta: float = 10000.0
    kind: Literal["plain", "linear", "llama3", "yarn", "dynamic", "longrope", "none"] = "plain"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192
    turned: int | None = None
    scale: float = 1.0
    score_scale: float = 1.0
    whole_turns: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelSpec:
    """Shape and arithmetic of a decoder-only transformer. Sizes are counts of elements; `*_bytes` are bytes.

    `rope=None` means learned positions; layers marked in `other_rope_layers` have `other_rope` in its place.
    `sliding_window` applies to the layers marked in `sliding_layers`. `norms`: whether attention and FFN have a norm
    before them, after them, or both; `parallel`: both take the same input, and their results are added together.
    `qk_norm`: RMSNorm of each head of q and k, or of all of them as one, or LayerNorm of each head. `embedding_norm`:
    embedded tokens are normed, without weights; `embedding_scale` and `logit_scale` are factors; `logit_cap` c makes
    logits z c tanh(z / c).
    `activation` is a name that `cpu_kernels.contract` knows. `dtype` is that of the matrices, but for
    `embedding_dtype` of embedding, positions and head where it is given; norms and biases have it too, or are f32
    beside int8 and int4 blocks. `wide_kv`: f16 does not hold keys and values; `kv`: how a run keeps them.
    `fingerprint` identifies the weights; artefacts carry it and are refused against any other model.
    """

    family: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    activation: str
    dtype: DType
    fingerprint: str
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    rope: RopeSpec | None = RopeSpec()
    other_rope: RopeSpec | None = None
    other_rope_layers: tuple[bool, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: QKNorm | None = None
    norms: Literal["before", "after", "both"] = "before"
    parallel: bool = False
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    tied: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    embedding_dtype: DType | None = None
    wide_kv: bool = False
    kv: KVChoice = "auto"

    @property
    def fires_sparsely(self) -> bool:
        """True when the activation is exactly zero for many inputs, so that neurons can be skipped without loss."""
        return fires_sparsely(self.activation)

    @property
    def certifiable(self) -> bool:
        """Whether copies of rows in 8 bits can prove neurons to be 0, and are shorter than the rows."""
        return self.fires_sparsely and not LAYOUTS[self.dtype].in_blocks

    @property
    def proxied(self) -> bool:
        """Whether no neuron is ever 0, and copies of rows in 4 bits are shorter than the rows."""
        return not self.fires_sparsely and self.dtype != "int4"

    def row_bytes(self, columns: int) -> int:
        """Bytes of a matrix row of `columns` weights; in blocks this counts scales and padding."""
        return LAYOUTS[self.dtype].row_bytes(columns)

    @property
    def embedding_row_bytes(self) -> int:
        """Bytes of a row of the embedding, of positions or of the head."""
        return LAYOUTS[self.embedding_dtype or self.dtype].row_bytes(self.d_model)

    @property
    def vector_element_bytes(self) -> int:
        """Bytes of one element of a norm or a bias: as the weights', f32 beside blocks."""
        layout = LAYOUTS[self.dtype]
        return 4 if layout.in_blocks else layout.bits // 8

    @property
    def kv_dtype(self) -> Literal["f32", "f16", "int8"]:
        """How keys and values are kept: int8; or f32 beside f32 weights and where f16 does not hold them; or f16."""
        if self.kv == "int8":
            return "int8"
        return "f32" if self.dtype == "f32" or self.wide_kv else "f16"

    @property
    def kv_element_bytes(self) -> int:
        """Bytes of a key's or value's element."""
        return {"f32": 4, "f16": 2, "int8": 1}[self.kv_dtype]

    @property
    def kv_scale_bytes(self) -> int:
        """Bytes of the f32 scale that int8 has for each token's keys of a head, and one for its values; else 0."""
        return 4 if self.kv_dtype == "int8" else 0

    @property
    def rows_per_neuron(self) -> int:
        """Vectors of length d_model that one neuron owns: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    @property
    def neuron_bytes(self) -> int:
        bias = self.rows_per_neuron - 1 if self.ffn_bias else 0
        return self.rows_per_neuron * self.row_bytes(self.d_model) + bias * self.vector_element_bytes

    @property
    def layer_ffn_bytes(self) -> int:
        """Bytes of all neurons of a layer; the down projection's own bias is counted with the dense weights."""
        return self.d_ff * self.neuron_bytes

    @property
    def layer_dense_bytes(self) -> int:
        """Bytes of a layer outside its neurons: attention projections, norms and the down projection's bias."""
        d, q, kv = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        vectors = (q + 2 * kv) * self.qkv_bias + d * self.out_bias + d * self.ffn_bias
        vectors += (4 if self.norms == "both" else 2) * d * (1 if self.norm == "rms" else 2)
        vectors += (self.q_norm_size + self.k_norm_size) * (2 if self.qk_norm == "head layer" else 1)
        matrices = (q + 2 * kv) * self.row_bytes(d) + d * self.row_bytes(q)
        return matrices + vectors * self.vector_element_bytes

    @property
    def q_norm_size(self) -> int:
        """Weights of the norm of queries; 0 for none."""
        return 0 if self.qk_norm is None else self.head_dim * (self.n_heads if self.qk_norm == "all" else 1)

    @property
    def k_norm_size(self) -> int:
        """Weights of the norm of keys; 0 for none."""
        return 0 if self.qk_norm is None else self.head_dim * (self.n_kv_heads if self.qk_norm == "all" else 1)

    @property
    def head_bytes(self) -> int:
        """Bytes of the output projection and the final norm."""
        norm = (1 if self.norm == "rms" else 2) * self.d_model * self.vector_element_bytes
        return self.vocab_size * self.embedding_row_bytes + norm

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the input embedding that the head does not share, and of learned positions."""
        rows = 0 if self.tied else self.vocab_size
        rows += 0 if self.rope else self.max_context + 2
        return rows * self.embedding_row_bytes

    @property
    def model_bytes(self) -> int:
        per_layer = self.layer_dense_bytes + self.layer_ffn_bytes
        return self.n_layers * per_layer + self.head_bytes + self.embedding_bytes

    def kv_bytes_per_layer(self, context: int) -> int:
        """Bytes of keys and values of one layer for `context` tokens."""
        return 2 * context * self.n_kv_heads * (self.head_dim * self.kv_element_bytes + self.kv_scale_bytes)
