"""What the mailbox's kernels share with the host and keep on the device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from cpu_kernels.contract import FLAG_WORDS, MAX_BATCH, REQUEST_WORDS


class State(IntEnum):
    """Words of the state, on the device: the last request's number, whether an answer is due, the number of a request
    that failed, or 0, the number of the input posted last, that of the last request for which the wait is over, and
    nanoseconds waited for the host in all."""

    NUMBER, DUE, FAILED, POSTED, ENDED, WAITED = 0, 1, 2, 3, 4, 5


class Tally(IntEnum):
    """What is counted on the device: neurons of each kind since the tallies were zeroed."""

    HOT, SENT, ZERO_COPY = 0, 1, 2


REPORT_WORDS = len(State) + len(Tally)


@dataclass(frozen=True, eq=False)
class ZeroCopy:
    """Cold neurons, from the last hot one up to number `stop`, that the GPU reads from host memory itself.

    ids: int32, counted from the first of them, and masks: int32, of at least so many; count: int32 [1]; all on the
    device.
    """

    stop: int
    ids: torch.Tensor
    masks: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True, eq=False)
class Mailbox:
    """Pinned host tensors as in `cpu_kernels.mailbox.Box`, the device's state, and what was sent to each side.

    request, flags: int64, whose words `cpu_kernels/contract.py` names; x, out: f32 [32, d]; ids, masks: int32 [f],
    the latter the host's uint32. state and tallies: int64, words of `State` and `Tally`, on the device.
    """

    request: torch.Tensor
    flags: torch.Tensor
    x: torch.Tensor
    ids: torch.Tensor
    masks: torch.Tensor
    out: torch.Tensor
    state: torch.Tensor
    tallies: torch.Tensor
    timeout: float

    @classmethod
    def new(cls, d: int, f: int, report: torch.Tensor, pinned: bool, timeout: float = 5.0) -> Mailbox:
        """For `f` neurons of width `d`. report: int64 [REPORT_WORDS] on the device, which takes state and tallies;
        timeout: seconds that the GPU waits for an answer."""

        def host(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, pin_memory=pinned)

        return cls(
            request=host((REQUEST_WORDS,), torch.int64),
            flags=host((FLAG_WORDS,), torch.int64),
            x=host((MAX_BATCH, d), torch.float32),
            ids=host((f,), torch.int32),
            masks=host((f,), torch.int32).fill_(-1),
            out=host((MAX_BATCH, d), torch.float32),
            state=report[: len(State)],
            tallies=report[len(State) :],
            timeout=timeout,
        )
