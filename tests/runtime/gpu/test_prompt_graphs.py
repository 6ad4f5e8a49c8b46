"""In which pieces a prompt goes through graphs. That they are right is test_prefill's to show, where all is hot."""

import pytest

from hybrid.runtime.gpu.prompt_graphs import pieces_of, sizes_up_to


@pytest.mark.parametrize(
    ("most", "sizes"), [(512, (64, 128, 256, 512)), (64, (64,)), (65, (64, 65)), (5, (5,)), (300, (64, 128, 256, 300))]
)
def test_sizes(most, sizes):
    assert sizes_up_to(most) == sizes


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (1, [64]), (64, [64]), (65, [64, 64]), (96, [64, 64]), (97, [128]), (140, [128, 64]), (200, [256]),
        (300, [256, 64]), (400, [512]), (512, [512]), (513, [512, 64]), (1000, [512, 512]), (2048, [512] * 4),
    ],
)  # fmt: skip
def test_pieces(count, sizes):
    found = pieces_of(count, sizes_up_to(512))
    assert [piece.size for piece in found] == sizes
    assert [i for piece in found for i in range(piece.tokens.start, piece.tokens.stop)] == list(range(count))
    assert all(piece.tokens.stop - piece.tokens.start <= piece.size for piece in found)
