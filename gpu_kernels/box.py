"""What the mailbox's kernels share with the host and keep on the device.

The state is int64 [4] on the device: the last request's number, whether an answer is due, whether the step failed, and
the number of the input posted last.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

STATE_WORDS = 4


class State(IntEnum):
    """Words of the state."""

    NUMBER, DUE, FAILED, POSTED = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class ZeroCopy:
    """Cold neurons, from the last hot one up to number `stop`, that the GPU reads from host memory itself.

    ids: int32, counted from the first of them, and masks: uint8, of at least so many; count: int32 [1]; all on the
    device.
    """

    stop: int
    ids: torch.Tensor
    masks: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True, eq=False)
class Mailbox:
    """Pinned host tensors as in `cpu_kernels.mailbox.Box`, the device's state, and what was sent to each side.

    request: int64 [8]; flags: int64, of which the first is the last answer's number; x, out: f32 [8, d]; ids: int32
    [f]; masks: uint8 [f]. state: int64 [4] and tallies int64 [3] (neurons hot, sent, zero-copy), on the device.
    """

    request: torch.Tensor
    flags: torch.Tensor
    x: torch.Tensor
    ids: torch.Tensor
    masks: torch.Tensor
    out: torch.Tensor
    state: torch.Tensor
    tallies: torch.Tensor
    timeout: float = 5.0
