"""What the compiled decode step works on: columns of its table of addresses, sizes, and its buffers.

A step is given its buffers as `address_table`s and makes its tuples of them itself: see `addresses.py`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from cpu_kernels.addresses import reader_of
from cpu_kernels.compiled import subroutine
from cpu_kernels.ffn_phases import DownScratch, new_down_scratch, sum_parts
from cpu_kernels.lanes import Input, new_inputs
from cpu_kernels.low_rank import COUNT_STRIDE
from cpu_kernels.row_sum import new_sums

DENSE, EXACT, LEARNED = 0, 1, 2


class Column(IntEnum):
    """Columns of the table: addresses, 0 where a layer has no such part, and numbers; biases, norms, scales: f32.

    ROTATION: the first row of the layer's RoPE in the table of cosines and sines.
    """

    QKV, QKV_BIAS, OUT, OUT_BIAS = 0, 1, 2, 3
    ATTENTION_NORM, ATTENTION_NORM_BIAS, FFN_NORM, FFN_NORM_BIAS, Q_NORM, K_NORM = 4, 5, 6, 7, 8, 9
    GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = 10, 11, 12, 13, 14, 15
    KV, WINDOW, HOT = 16, 17, 18
    FC1, FC1_SCALE, FC1_BIAS, FC2, FC2_SCALE, FC2_BIAS, RANK, THRESHOLD = 19, 20, 21, 22, 23, 24, 25, 26
    ATTENTION_POST_NORM, FFN_POST_NORM, Q_NORM_BIAS, K_NORM_BIAS, ROTATION = 27, 28, 29, 30, 31


class Ends(IntEnum):
    """Entries of the table's last row, which belongs to no layer."""

    EMBEDDING, POSITIONS, FINAL_NORM, FINAL_NORM_BIAS, HEAD, EMBEDDING_NORM = 0, 1, 2, 3, 4, 5


class Phase(IntEnum):
    """Where ticks are counted."""

    ATTENTION, PREDICTOR, FFN, HEAD = 0, 1, 2, 3


class Count(IntEnum):
    """What is counted over the layers."""

    COMPUTED, FIRED_HOT, FIRED_COLD = 0, 1, 2


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
    the embedding is multiplied with."""

    EPS, SCALE, TOKEN, POSITION = 13, 14, 15, 16


class Shared(NamedTuple):
    """Buffers of all workers: the residual x [1, d], and what each phase leaves to the next."""

    x: np.ndarray
    qkv: np.ndarray
    qkv_heads: np.ndarray
    attended: np.ndarray
    projected: np.ndarray
    scores: np.ndarray
    hidden_units: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    hidden: np.ndarray
    ones: np.ndarray
    sums: np.ndarray
    offsets: np.ndarray
    logits: np.ndarray
    tallies: np.ndarray
    ticks: np.ndarray


class Own(NamedTuple):
    """Buffers of one worker alone; ahead: the FFN's input where it is that of attention."""

    inputs: Input
    ahead: Input
    attended: Input
    units: Input
    ids: np.ndarray
    hidden: np.ndarray
    places: np.ndarray
    down: DownScratch


def new_shared(shape: Shape, rank: int, workers: int) -> Shared:
    """Shared buffers; `rank` is the largest of the predictors', or 0."""
    heads = shape.heads + 2 * shape.kv_heads
    qkv = np.zeros((1, heads * shape.head_dim), np.float32)
    sums, offsets = new_sums(int(sum_parts(shape.f)), shape.d)
    return Shared(
        x=np.zeros((1, shape.d), np.float32),
        qkv=qkv,
        qkv_heads=qkv.reshape(heads, shape.head_dim),
        attended=np.zeros((shape.heads, shape.head_dim), np.float32),
        projected=np.zeros((1, shape.d), np.float32),
        scores=np.zeros((shape.heads, shape.block_size + 2), np.float32),
        hidden_units=np.zeros(rank, np.float32),
        counts=np.zeros(workers * COUNT_STRIDE, np.int64),
        ids=np.zeros(shape.f, np.int32),
        hidden=np.zeros((1, shape.f), np.float32),
        ones=np.ones(shape.f, np.uint8),
        sums=sums,
        offsets=offsets,
        logits=np.zeros((1, shape.vocab), np.float32),
        tallies=np.zeros(len(Count), np.int64),
        ticks=np.zeros(len(Phase), np.int64),
    )


def new_own(shape: Shape, rank: int) -> Own:
    """Buffers of one worker."""
    return Own(
        inputs=new_inputs(1, shape.d),
        ahead=new_inputs(1, shape.d),
        attended=new_inputs(1, shape.heads * shape.head_dim),
        units=new_inputs(1, max(1, rank)),
        ids=np.zeros(shape.f + 1, np.int32),
        hidden=np.zeros(shape.f, np.float32),
        places=np.zeros(shape.f, np.int32),
        down=new_down_scratch(shape.d, shape.f, 1),
    )


def new_numbers(shape: Shape, eps: float, scale: float) -> np.ndarray:
    """A step's numbers, int64, with token and position 0."""
    return np.array([*shape, *np.array([eps, scale]).view(np.int64), 0, 0], np.int64)


@subroutine
def shape_of(numbers):  # type: ignore[no-untyped-def]
    n = numbers
    return Shape(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12])


_SMALL = Shape(*[1] * len(Shape._fields))
# Of the address table of (rotation, blocks, buffers of all workers), and of that of one worker's buffers.
read_shared = reader_of(((np.zeros((1, 1), np.float32),) * 2, np.zeros(1, np.int32), new_shared(_SMALL, 1, 1)))
read_own = reader_of(new_own(_SMALL, 1))
