"""Long texts to token ids piece by piece, so that memory does not grow with the text.

A tokenizer takes some 130 to 800 bytes for each character of one call, and ends the process where there is no more
memory. Pieces overlap, and are joined where both read the same tokens at the same places, so that words, special tokens
and characters which a piece's end cuts through come out as in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

PIECE_CHARACTERS = 65_536  # of one call: 10 to 50 MB
_OVERLAP = 2_048
_RUN = 8  # tokens that two pieces must agree on before they are joined

Mark = tuple[int, int, int]  # first character of a token, the one after its last, its id


def encode_pieces(
    tokenizer: Tokenizer, text: str, size: int = PIECE_CHARACTERS, overlap: int = _OVERLAP
) -> Iterator[list[int]]:
    """Token ids of `text`, without what surrounds a text; together they are those of one call.

    size: characters of a piece, of which `overlap`, at most half, are read by the next one too. Where pieces do not
    agree on any tokens in their overlap, as in one word of thousands of characters, the text is cut at a piece's end.
    """
    at, done = 0, 0  # where the piece begins, and how many of its tokens the piece before gave
    encoding = tokenizer.encode(text[:size], add_special_tokens=False)
    while at + size < len(text):
        following = at + size - overlap
        next_encoding = tokenizer.encode(text[following : following + size], add_special_tokens=False)
        span = (following + overlap // 4, following + overlap - overlap // 4)  # away from where each was cut
        joint = _joint(_marks(encoding, at, *span), _marks(next_encoding, following, *span))
        if joint is None:
            following, end, begin = at + size, len(encoding.ids), 0
            next_encoding = tokenizer.encode(text[following : following + size], add_special_tokens=False)
        else:
            end, begin = joint
        yield encoding.ids[done:end]
        at, done, encoding = following, begin, next_encoding
    yield encoding.ids[done:]


def _marks(encoding: Any, at: int, start: int, end: int) -> dict[int, Mark]:
    """Tokens of a piece that begins at character `at`, those in `start` to `end`, by their number in the piece."""
    return {
        number: (first + at, last + at, token)
        for number, ((first, last), token) in enumerate(zip(encoding.offsets, encoding.ids, strict=True))
        if start <= first + at < end
    }


def _joint(before: dict[int, Mark], after: dict[int, Mark]) -> tuple[int, int] | None:
    """Numbers of the token, in the two pieces, from which on the second goes on; None where they do not agree."""
    ours, theirs = list(before.values()), list(after.values())
    places = {mark: place for place, mark in enumerate(theirs)}
    for index in range(len(ours) - _RUN + 1):
        place = places.get(ours[index])
        if place is not None and ours[index : index + _RUN] == theirs[place : place + _RUN]:
            return list(before)[index + _RUN // 2], list(after)[place + _RUN // 2]
    return None
