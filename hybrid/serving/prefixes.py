"""`PrefixTree`: KV blocks of texts that were read, found again by the tokens that a request begins with.

RadixAttention (arXiv 2312.07104), in whole blocks: a node is one full block, known under its parent by its tokens. The
tree refers to each of its blocks once (`KVPool`); sequences that begin with them refer to them too. Where blocks are
wanted, the least recently used leaves go first, of those that nobody else refers to.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid.model.kv_cache import KVPool

_Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Node:
    """A full block; used: when it was found last."""

    key: _Tokens
    block: int
    parent: _Node | None
    used: int
    children: dict[_Tokens, _Node] = field(default_factory=dict)


class PrefixTree:
    """Full blocks of `pool` by their tokens. Used from the pool's thread."""

    def __init__(self, pool: KVPool, limit: int | None = None) -> None:
        """limit: keys of a prompt of more tokens are turned in another way from its start (RoPE that follows the
        length), so it shares nothing, and of an answer that grows beyond, nothing from there on is shared."""
        self._pool, self._limit = pool, limit
        self._root = _Node((), -1, None, 0)
        self._nodes: dict[int, _Node] = {}  # by block
        self._now = 0

    @property
    def blocks(self) -> int:
        """How many it keeps."""
        return len(self._nodes)

    def match(self, tokens: Sequence[int], most: int, prompt: int = 0) -> list[int]:
        """Blocks of the longest known beginning of `tokens`, of at most `most` tokens; prompt: how many of them were,
        or will be, read as one text."""
        if self._limit is not None and prompt > self._limit:
            return []
        node, found = self._root, list[int]()
        self._now += 1
        for key in self._keys(tokens, most):
            child = node.children.get(key)
            if child is None:
                break
            child.used, node = self._now, child
            found.append(child.block)
        return found

    def insert(self, tokens: Sequence[int], blocks: Sequence[int], prompt: int = 0) -> None:
        """Keep the full ones of `blocks`, which hold `tokens`; of those that are known already, the known ones stay."""
        if self._limit is not None and prompt > self._limit:
            return
        node = self._root
        self._now += 1
        most = len(tokens) if self._limit is None else min(len(tokens), self._limit)
        for key, block in zip(self._keys(tokens, most), blocks, strict=False):
            child = node.children.get(key)
            if child is None:
                if block in self._nodes:  # under other tokens: impossible while a block's content stands
                    raise ValueError(f"KV block {block} is in the tree already, with other tokens")
                child = node.children[key] = self._nodes[block] = _Node(key, block, node, self._now)
                self._pool.share([block])
            child.used, node = self._now, child

    def idle(self) -> int:
        """Blocks that can be freed, now or once those after them are: nobody else refers to them or what follows."""
        held: set[int] = set()
        for node in self._nodes.values():
            walked: _Node | None = node
            if self._pool.references(node.block) > 1:
                while walked is not None and walked is not self._root and walked.block not in held:
                    held.add(walked.block)
                    walked = walked.parent
        return len(self._nodes) - len(held)

    def evict(self, count: int) -> bool:
        """Free `count` blocks; False, and none is freed, where there are not so many to free."""
        if count > self.idle():
            return False
        leaves = [(node.used, node.block) for node in self._nodes.values() if self._is_free_leaf(node)]
        heapq.heapify(leaves)
        for _ in range(count):
            _, block = heapq.heappop(leaves)
            parent = self._remove(self._nodes[block])
            if self._is_free_leaf(parent):
                heapq.heappush(leaves, (parent.used, parent.block))
        return True

    def _is_free_leaf(self, node: _Node) -> bool:
        return node is not self._root and not node.children and self._pool.references(node.block) == 1

    def _remove(self, node: _Node) -> _Node:
        parent = node.parent or self._root
        del parent.children[node.key], self._nodes[node.block]
        self._pool.release([node.block])
        return parent

    def _keys(self, tokens: Sequence[int], most: int) -> list[_Tokens]:
        size = self._pool.block_size
        return [tuple(tokens[at : at + size]) for at in range(0, min(most, len(tokens)) // size * size, size)]
