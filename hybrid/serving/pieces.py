"""`PieceLengths`: how many tokens of a prompt can be read while the tokens of others wait, as it was measured."""

from __future__ import annotations

FEWEST = 8  # tokens of a piece, so that a prompt is read in the end whatever a token takes
_FIRST_RETRY, _LAST_RETRY = 32, 512  # pieces after which a length that took too long is tried again
_STRIKES = 2  # times in a row that a length, which was fast enough before, may be slow by chance


class PieceLengths:
    """Seconds that pieces of 8, 16, 32 and so on took, up to `chunk` tokens.

    A piece's seconds are no straight line (short ones go through other kernels than long ones), so each length is known
    by itself, from the last pieces of it. A length that is not known yet is tried once half of it is known and takes at
    most half the time. One that took too long, twice in a row where it was fast enough before, is tried again after 32
    pieces, then after twice as many each time, up to 512.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk, self._pieces = chunk, 0
        self._seconds: dict[int, float] = {}
        self._slow: dict[int, int] = {}  # times in a row that a length took too long
        self._retry: dict[int, tuple[int, int]] = {}  # by length: when it is tried again, and how long that was put off

    def most(self, budget: float) -> int:
        """Tokens that are read in `budget` seconds, at least `FEWEST`."""
        length = FEWEST
        while 2 * length <= self._chunk and self._fits(2 * length, budget):
            length *= 2
        return length

    def note(self, tokens: int, seconds: float, budget: float) -> None:
        """A piece of so many tokens took so long, where `budget` seconds were to be had (infinite: as it came)."""
        self._pieces += 1
        if tokens < FEWEST or tokens & (tokens - 1):
            return  # the rest of a prompt
        before = self._seconds.get(tokens)
        if seconds <= budget:
            self._seconds[tokens] = seconds if before is None or before > budget else (before + seconds) / 2
            self._slow.pop(tokens, None)
            self._retry.pop(tokens, None)
            return
        self._slow[tokens] = self._slow.get(tokens, 0) + 1
        if before is not None and before <= budget and self._slow[tokens] < _STRIKES:
            return
        _, put_off = self._retry.get(tokens, (0, _FIRST_RETRY // 2))
        put_off = min(2 * put_off, _LAST_RETRY)
        self._seconds[tokens], self._retry[tokens] = seconds, (self._pieces + put_off, put_off)

    def _fits(self, length: int, budget: float) -> bool:
        known, half = self._seconds.get(length), self._seconds.get(length // 2)
        if known is not None:
            return known <= budget or (length in self._retry and self._pieces >= self._retry[length][0])
        return half is not None and 2 * half <= budget
