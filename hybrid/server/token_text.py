"""The text and the bytes of single tokens, for log-probabilities: a token may be a part of a character."""

from __future__ import annotations

import json
import re
from functools import cached_property

from hybrid.formats.text import TextCodec

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Of one tokenizer, of which nothing is read before the first token."""

    def __init__(self, codec: TextCodec) -> None:
        self._tokenizer = codec.tokenizer

    @cached_property
    def _by_bytes(self) -> bool:
        decoder = self._tokenizer.decoder
        return decoder is not None and "ByteLevel" in _kinds(json.loads(decoder.__getstate__()))

    @cached_property
    def _special(self) -> dict[int, str]:
        return {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}

    def bytes_of(self, token: int) -> bytes:
        """What `token` stands for in UTF-8; a special token for its name."""
        if token in self._special:
            return self._special[token].encode()
        piece = self._tokenizer.id_to_token(token) or ""
        if self._by_bytes:
            return bytes(_BYTES[character] for character in piece if character in _BYTES)
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """Its text; of a part of a character its bytes as OpenAI writes them, `bytes:\\xe2\\x82`."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _kinds(decoder: dict[str, object]) -> list[object]:
    within = decoder.get("decoders") or ()
    return [decoder.get("type"), *(kind for item in within for kind in _kinds(item))]  # type: ignore[attr-defined]


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256 and on, in their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_letters()
