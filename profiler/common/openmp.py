"""torch's OpenMP threads: how they wait, and how many there are.

OpenMP's threads spin where they wait for each other, as they do at every small product: with GCC's library for up to
300,000 turns. A thread that spins keeps a core from the one that it waits for as soon as anything else runs. Beside
other work on 2 cores 20,000 tokens of a profile took 61 to 70 s of CPU time, and 12 to 14 with threads that sleep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a user can set of it: the standard's name, GCC's and LLVM's.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def passive_waits() -> Iterator[None]:
    """A torch that is first imported inside has OpenMP threads that sleep where they wait.

    The libraries read their settings once, when they are loaded. The setting is gone after the block, so that programs
    started later do not inherit it. A user's own setting stands. Where torch was imported before, its threads wait as
    they did, and nothing is changed.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SETTINGS):
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, this thread's torch operations are shared by `count` threads; after it by as many as before. 3 us.

    Also decorates functions.
    """
    import torch  # here, as this module must be there before torch is

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
