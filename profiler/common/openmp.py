"""torch's OpenMP threads: how they wait, and how many there are.

Threads that wait for each other, as they do at every small product, spin before they sleep. GCC's OpenMP does so for
300,000 turns, 3 to 6 ms, in which a thread keeps a core from the one that it waits for as soon as anything else runs.
5,000 turns, some 0.1 ms, are enough where nothing does. On 2 cores, with 300,000, 5,000 and no turns: 10,000 tokens of
a profile beside other work took 82, 21 and 20 s; alone, in us, a product of 512 x 384 x 1536 2530, 2440 and 2850,
one of 8 tokens 81, 81 and 194, and counting what fired 920, 840 and 1190.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TURNS = "5000"
_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # where one is set, it stands


@contextmanager
def short_spins() -> Iterator[None]:
    """A torch that is first imported inside has OpenMP threads that soon sleep where they wait.

    OpenMP reads its settings once, when it is loaded. Ours is gone after the block, so that programs started later do
    not inherit it. A user's own stands. Where torch was imported before, its threads wait as they did, and nothing is
    changed.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _USERS):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _TURNS
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


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
