"""The prefix tree: longest known beginning, what is shared and counted, what goes first, what cannot go."""

import numpy as np
import pytest
from serving_cases import BLOCK, SPEC

from hybrid.model.kv_cache import KVPool
from hybrid.serving.prefixes import PrefixTree


@pytest.fixture
def pool():
    return KVPool(SPEC, 8 * BLOCK, BLOCK)


@pytest.fixture
def tree(pool):
    return PrefixTree(pool)


def put(tree, pool, tokens, prompt=0):
    """As a sequence that ends does: blocks that it took are given to the tree, then released."""
    blocks = pool.take(-(-len(tokens) // BLOCK))
    tree.insert(tokens, blocks, prompt)
    pool.release(blocks)
    return blocks


def test_the_longest_known_beginning_in_whole_blocks(tree, pool):
    blocks = put(tree, pool, range(10))
    assert tree.blocks == 2 and pool.free == 6  # the third is not full
    assert tree.match(range(12), 12) == blocks[:2]
    assert tree.match([*range(7), 99], 8) == blocks[:1]
    assert tree.match([99, *range(7)], 8) == []
    assert tree.match(range(8), 7) == blocks[:1]  # at least one token is to be read


def test_the_same_tokens_elsewhere_are_another_block(tree, pool):
    put(tree, pool, [1, 2, 3, 4, 1, 2, 3, 4])
    assert tree.blocks == 2 and len(tree.match([1, 2, 3, 4] * 3, 12)) == 2


def test_what_is_known_stays_and_the_second_copy_goes(tree, pool):
    first, second = put(tree, pool, range(8)), pool.take(3)
    tree.insert(range(12), second)
    pool.release(second)
    assert tree.match(range(12), 12) == [*first, second[2]]
    assert pool.free == 5


def test_the_least_recently_used_leaf_goes_first(tree, pool):
    a, b = put(tree, pool, range(8)), put(tree, pool, [*range(4), *range(20, 28)])
    tree.match(range(8), 8)
    assert tree.evict(1)
    assert tree.match([*range(4), *range(20, 28)], 12) == [a[0], b[1]] and tree.blocks == 3
    tree.match(range(8), 8)
    assert tree.evict(1) and tree.match([*range(4), *range(20, 28)], 12) == a[:1]
    assert tree.evict(2) and pool.free == 8 and tree.blocks == 0


def test_what_a_sequence_uses_cannot_go_nor_what_it_follows(tree, pool):
    blocks = put(tree, pool, range(12))
    pool.share(blocks[1:2])  # one that computed its first block itself
    assert tree.idle() == 1 and not tree.evict(2) and tree.blocks == 3
    assert tree.evict(1) and not tree.evict(1)
    pool.release(blocks[1:2])
    assert tree.idle() == 2 and tree.evict(2) and pool.free == 8


def test_texts_whose_keys_are_turned_by_their_length_share_nothing(pool):
    tree = PrefixTree(pool, limit=8)
    put(tree, pool, range(12), prompt=5)  # an answer that grew beyond
    assert tree.blocks == 2
    assert len(tree.match(range(16), 16, prompt=6)) == 2 and tree.match(range(16), 16, prompt=9) == []
    put(tree, pool, range(30, 42), prompt=12)
    assert tree.blocks == 2


def test_counts_hold_through_any_order_of_use():
    rng, pool = np.random.default_rng(3), KVPool(SPEC, 40 * BLOCK, BLOCK)
    tree, held = PrefixTree(pool), []
    for _ in range(600):
        if held and rng.random() < 0.5:
            tokens, blocks = held.pop(rng.integers(len(held)))
            tree.insert(tokens, blocks)
            pool.release(blocks)
            continue
        tokens = rng.integers(0, 2, rng.integers(1, 7) * BLOCK).tolist()
        blocks = tree.match(tokens, len(tokens) - 1)
        pool.share(blocks)
        missing = len(tokens) // BLOCK - len(blocks)
        idle, lacking = tree.idle(), missing - pool.free
        if lacking > 0 and not tree.evict(lacking):
            assert idle < lacking
            pool.release(blocks)
            continue
        held.append((tokens, blocks + pool.take(missing)))
        distinct = {block for _, owned in held for block in owned} | set(tree._nodes)
        assert pool.free == pool.blocks - len(distinct)
    for _, blocks in held:
        pool.release(blocks)
    assert tree.idle() == tree.blocks and tree.evict(tree.blocks) and pool.free == pool.blocks
