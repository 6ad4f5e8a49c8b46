"""What the compiled decode step works on: columns of its table of addresses, sizes, and its buffers.

A step is given its buffers as `address_table`s and makes its tuples of them itself: see `addresses.py`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from cpu_kernels.addresses import reader_of
from cpu_kernels.compiled import subroutine
from cpu_kernels.contract import MAX_BATCH
from cpu_kernels.ffn_phases import DownScratch, new_down_scratch, sum_parts
from cpu_kernels.inputs import Input, new_inputs
from cpu_kernels.low_rank import COUNT_STRIDE
from cpu_kernels.row_sum import new_sums

DENSE, EXACT, LEARNED, CERTIFIED, PROXY = 0, 1, 2, 3, 4  # from LEARNED on, neurons are named first


class Column(IntEnum):
    """Columns of the table: addresses, 0 where a layer has no such part, and numbers; biases, norms, scales: f32.

    KV_SCALES: of int8 keys and values; ROTATION: the first row of the layer's RoPE in the table of cosines and sines.
    """

    QKV, QKV_BIAS, OUT, OUT_BIAS = 0, 1, 2, 3
    ATTENTION_NORM, ATTENTION_NORM_BIAS, FFN_NORM, FFN_NORM_BIAS, Q_NORM, K_NORM = 4, 5, 6, 7, 8, 9
    GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = 10, 11, 12, 13, 14, 15
    KV, WINDOW, HOT = 16, 17, 18
    FC1, FC1_SCALE, FC1_BIAS, FC2, FC2_SCALE, FC2_BIAS, RANK, THRESHOLD = 19, 20, 21, 22, 23, 24, 25, 26
    ATTENTION_POST_NORM, FFN_POST_NORM, Q_NORM_BIAS, K_NORM_BIAS, ROTATION, KV_SCALES = 27, 28, 29, 30, 31, 32
    COPY, COPY_SLOPE, COPY_REST, COPY_UP, COPY_LENGTHS = 33, 34, 35, 36, 37


class Ends(IntEnum):
    """Entries of the table's last row, which belongs to no layer."""

    EMBEDDING, POSITIONS, FINAL_NORM, FINAL_NORM_BIAS, HEAD, EMBEDDING_NORM = 0, 1, 2, 3, 4, 5


class Phase(IntEnum):
    """Where ticks are counted."""

    ATTENTION, PREDICTOR, FFN, HEAD = 0, 1, 2, 3


class Count(IntEnum):
    """What is counted over the layers: neurons computed, each for every row that it is computed for, and those of the
    union over rows, whose weights are read; firings of hot and of cold ones."""

    COMPUTED, FIRED_HOT, FIRED_COLD, UNION = 0, 1, 2, 3


class Shape(NamedTuple):
    """Sizes that the step needs, in the order in which compiled code unpacks them.

    parallel: attention and FFN take the same input; all_heads_normed: q has one norm over all heads, and so has k.
    """

    d: int
    f: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    blocks: int
    block_size: int
    layer_norm: int
    activation: int
    strategy: int
    parallel: int = 0
    all_heads_normed: int = 0


class Number(IntEnum):
    """Entries of a step's numbers, int64, that follow the `Shape`; EPS, SCALE: the bits of an f64, the latter of what
    the embedding is multiplied with; ROWS: how many rows the step has, of which those from FIRST on get logits."""

    EPS, SCALE, ROWS, FIRST = 13, 14, 15, 16


class Shared(NamedTuple):
    """Buffers of all workers, for up to R = `MAX_BATCH` rows: tokens and positions int64 [R], the rows' block tables
    int32 [R, n], which the caller writes; the residual x [R, d], and what each phase leaves to the next. Heads of a
    row lie beneath each other, [R heads, head_dim]; hidden f32 [R f] is [rows, n] for the n neurons listed in `ids`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    x: np.ndarray
    qkv: np.ndarray
    qkv_heads: np.ndarray
    attended: np.ndarray
    projected: np.ndarray
    scores: np.ndarray
    hidden_units: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    masks: np.ndarray
    hidden: np.ndarray
    every: np.ndarray
    ones: np.ndarray
    sums: np.ndarray
    offsets: np.ndarray
    logits: np.ndarray
    tallies: np.ndarray
    ticks: np.ndarray


class Own(NamedTuple):
    """Buffers of one worker alone; ahead: the FFN's input where it is that of attention; lengths: of inputs."""

    inputs: Input
    ahead: Input
    attended: Input
    units: Input
    ids: np.ndarray
    masks: np.ndarray
    hidden: np.ndarray
    places: np.ndarray
    lengths: np.ndarray
    down: DownScratch


def new_shared(shape: Shape, rank: int, workers: int, table: int) -> Shared:
    """Shared buffers; `rank` is the largest of the predictors', or 0, `table` the blocks of a sequence's table."""
    heads, most = shape.heads + 2 * shape.kv_heads, MAX_BATCH
    qkv = np.zeros((most, heads * shape.head_dim), np.float32)
    sums, offsets = new_sums(int(sum_parts(shape.f)) * most, shape.d)
    return Shared(
        tokens=np.zeros(most, np.int64),
        positions=np.zeros(most, np.int64),
        tables=np.zeros((most, table), np.int32),
        x=np.zeros((most, shape.d), np.float32),
        qkv=qkv,
        qkv_heads=qkv.reshape(most * heads, shape.head_dim),
        attended=np.zeros((most * shape.heads, shape.head_dim), np.float32),
        projected=np.zeros((most, shape.d), np.float32),
        scores=np.zeros((shape.heads, shape.block_size + 2), np.float32),
        hidden_units=np.zeros((most, rank), np.float32),
        counts=np.zeros(workers * COUNT_STRIDE, np.int64),
        ids=np.zeros(shape.f, np.int32),
        masks=np.zeros(shape.f, np.uint32),
        hidden=np.zeros(most * shape.f, np.float32),
        every=np.arange(shape.f, dtype=np.int32),
        ones=np.full(shape.f, 2**MAX_BATCH - 1, np.uint32),
        sums=sums,
        offsets=offsets,
        logits=np.zeros((most, shape.vocab), np.float32),
        tallies=np.zeros(len(Count), np.int64),
        ticks=np.zeros(len(Phase), np.int64),
    )


def new_own(shape: Shape, rank: int) -> Own:
    """Buffers of one worker."""
    return Own(
        inputs=new_inputs(MAX_BATCH, shape.d),
        ahead=new_inputs(MAX_BATCH, shape.d),
        attended=new_inputs(MAX_BATCH, shape.heads * shape.head_dim),
        units=new_inputs(MAX_BATCH, max(1, rank)),
        ids=np.zeros(shape.f + 1, np.int32),
        masks=np.zeros(shape.f + 1, np.uint32),
        hidden=np.zeros(shape.f, np.float32),
        places=np.zeros(shape.f, np.int32),
        lengths=np.zeros(MAX_BATCH, np.float32),
        down=new_down_scratch(shape.d, shape.f),
    )


def new_numbers(shape: Shape, eps: float, scale: float) -> np.ndarray:
    """A step's numbers, int64, of no row."""
    return np.array([*shape, *np.array([eps, scale]).view(np.int64), 0, 0], np.int64)


@subroutine
def shape_of(numbers):  # type: ignore[no-untyped-def]
    n = numbers
    return Shape(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12])


_SMALL = Shape(*[1] * len(Shape._fields))
# Of the address table of (rotation, buffers of all workers), and of that of one worker's buffers.
read_shared = reader_of(((np.zeros((1, 1), np.float32),) * 2, new_shared(_SMALL, 1, 1, 1)))
read_own = reader_of(new_own(_SMALL, 1))
