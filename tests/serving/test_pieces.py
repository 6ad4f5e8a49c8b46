"""How long a prompt's pieces are, by what pieces took."""

from hybrid.serving.pieces import PieceLengths


def learn(lengths, cost, budget, pieces):
    found = []
    for _ in range(pieces):
        found.append(lengths.most(budget))
        lengths.note(found[-1], cost(found[-1]), budget)
    return found


def test_lengths_grow_while_they_fit():
    lengths = PieceLengths(256)
    assert learn(lengths, lambda n: 0.001 * n, 0.1, 7) == [8, 16, 32, 64, 64, 64, 64]
    assert learn(PieceLengths(32), lambda n: 0.0, 0.1, 4) == [8, 16, 32, 32]
    assert PieceLengths(4).most(1.0) == 8


def test_a_jump_of_the_cost_is_met_once():
    """Beyond 32 tokens other kernels are used, that take long for few."""
    cost = lambda n: 0.002 * n if n <= 32 else 0.25 + 0.0002 * n  # noqa: E731
    lengths = PieceLengths(256)
    assert learn(lengths, cost, 0.14, 60) == [8, 16, 32, 64] + [32] * 32 + [64] + [32] * 23
    again = learn(lengths, cost, 0.14, 400)
    assert again.count(64) == 2 and again.count(32) == 398  # after 64 pieces, then 128, then 256


def test_one_slow_moment_is_not_remembered_for_ever():
    lengths = PieceLengths(64)
    learn(lengths, lambda n: 0.001 * n, 0.1, 4)
    lengths.note(64, 9.0, 0.1)
    assert lengths.most(0.1) == 32
    assert learn(lengths, lambda n: 0.001 * n, 0.1, 40)[-1] == 64


def test_what_was_read_while_nobody_waited_counts_too():
    lengths = PieceLengths(64)
    for n in (8, 16, 32):
        lengths.note(n, 0.001 * n, float("inf"))
    lengths.note(64, 0.06, float("inf"))
    assert lengths.most(0.05) == 32 and lengths.most(0.5) == 64


def test_the_rest_of_a_prompt_is_no_length():
    lengths = PieceLengths(64)
    lengths.note(9, 0.001, 0.1)
    lengths.note(3, 0.001, 0.1)
    assert lengths.most(0.1) == 8


def test_the_slowest_of_late_counts():
    lengths = PieceLengths(16)
    assert not lengths.fits(0.5)
    learn(lengths, lambda n: 0.001 * n, 0.1, 4)
    lengths.note(8, 0.09, 0.1)  # a slow one, that still fitted
    assert not lengths.fits(0.08) and lengths.fits(0.09)
    for _ in range(20):
        lengths.note(8, 0.008, 0.1)
    assert lengths.fits(0.014) and not lengths.fits(0.008)


def test_the_length_that_takes_least_for_a_token():
    lengths = PieceLengths(256)
    cost = lambda n: {64: 0.055, 128: 0.08}.get(n, 0.0005 * n)  # noqa: E731
    assert learn(lengths, cost, 0.2, 8) == [8, 16, 32, 64, 128, 256, 256, 256]
    assert lengths.most(0.1) == 32 and lengths.most(0.02) == 32 and lengths.most(0.01) == 16
