"""An answer as the newer APIs tell it: one block after another, each a text or a call, that begins, grows and ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybrid.server.answer import Delta
from hybrid.serving.request import TokenLogprob


@dataclass
class Block:
    """A text, or, where it has a name, a call: then `text` is its arguments' JSON."""

    text: str = ""
    id: str = ""
    name: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class BlockEvent:
    """What happens to block number `index`; text: what a `grow` adds."""

    kind: Literal["begin", "grow", "end"]
    index: int
    block: Block
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Blocks:
    """The blocks of one answer so far."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.last: Delta | None = None
        self._open = False

    def add(self, delta: Delta) -> list[BlockEvent]:
        """What `delta` changes. With the last one the last block ends; an answer has at least one."""
        self.last, events = delta, list[BlockEvent]()
        logprobs = (delta.logprob,) if delta.logprob else ()
        if delta.text or (delta.finish and not self.blocks and not delta.calls):
            if not self._open or self.blocks[-1].name is not None:
                events += self._begin(Block())
            events += self._grow(delta.text, logprobs)
        for piece in delta.calls:
            if piece.name is not None:
                events += self._begin(Block(id=piece.id or "", name=piece.name))
            events += self._grow(piece.arguments)
        return events + (self._end() if delta.finish else [])

    def _begin(self, block: Block) -> list[BlockEvent]:
        ended = self._end()
        self.blocks.append(block)
        self._open = True
        return [*ended, BlockEvent("begin", len(self.blocks) - 1, block)]

    def _grow(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> list[BlockEvent]:
        block = self.blocks[-1]
        block.text += text
        block.logprobs += logprobs
        return [BlockEvent("grow", len(self.blocks) - 1, block, text, logprobs)] if text else []

    def _end(self) -> list[BlockEvent]:
        was, self._open = self._open, False
        return [BlockEvent("end", len(self.blocks) - 1, self.blocks[-1])] if was else []
