"""`PieceLengths`: how many tokens of a prompt can be read while the tokens of others wait, as it was measured."""

from __future__ import annotations

FEWEST = 8  # tokens of a piece, so that a prompt is read in the end whatever a token takes
_FIRST_RETRY, _LAST_RETRY = 32, 512  # pieces after which a length that took too long is tried again
_FORGETS = 8  # pieces over which the slowest is forgotten


class PieceLengths:
    """Seconds that pieces of 8, 16, 32 and so on took, up to `chunk` tokens.

    A piece's seconds are no straight line (short ones go through other kernels than long ones), so each length is known
    by itself, by the slowest of its last pieces: now and then one takes twice as long as the rest, and it is that one
    which others would wait for. A length that is not known yet is tried once half of it is known and takes at most half
    the time. One that took too long is tried again after 32 pieces, then after twice as many each time, up to 512.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk, self._pieces = chunk, 0
        self._seconds: dict[int, float] = {}
        self._retry: dict[int, tuple[int, int]] = {}  # by length: when it is tried again, and how long that was put off

    def most(self, budget: float) -> int:
        """Tokens to read at once in at most `budget` seconds: of the lengths that fit the one that takes least for each
        token, or now and then the longest, so that it stays known; at least `FEWEST`."""
        length = best = FEWEST
        while 2 * length <= self._chunk and self._fits(2 * length, budget):
            length *= 2
            if length not in self._seconds or self._seconds[length] > budget:
                return length
            if length * self._seconds.get(best, budget) >= best * self._seconds[length]:
                best = length
        return length if self._pieces % _FIRST_RETRY == 0 else best

    def fits(self, budget: float) -> bool:
        """Whether any piece is known to take at most `budget` seconds."""
        known = self._seconds.get(FEWEST)
        return known is not None and known <= budget

    def note(self, tokens: int, seconds: float, budget: float) -> None:
        """A piece of so many tokens took so long, where `budget` seconds were to be had (infinite: as it came)."""
        self._pieces += 1
        if tokens < FEWEST or tokens & (tokens - 1):
            return  # the rest of a prompt
        before = self._seconds.get(tokens, seconds)
        if seconds > budget:
            _, put_off = self._retry.get(tokens, (0, _FIRST_RETRY // 2))
            put_off = min(2 * put_off, _LAST_RETRY)
            self._seconds[tokens], self._retry[tokens] = seconds, (self._pieces + put_off, put_off)
            return
        if self._retry.pop(tokens, None) is not None:
            before = seconds  # what slowed it is gone
        self._seconds[tokens] = seconds if seconds > before else before + (seconds - before) / _FORGETS

    def _fits(self, length: int, budget: float) -> bool:
        known, half = self._seconds.get(length), self._seconds.get(length // 2)
        if known is not None:
            return known <= budget or (length in self._retry and self._pieces >= self._retry[length][0])
        return half is not None and 2 * half <= budget
