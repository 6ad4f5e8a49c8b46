"""Sizes as people write them."""

import pytest

from profiler.common.errors import BudgetError
from profiler.common.sizes import UNLIMITED, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("0.0", 0),
        ("0GiB", 0),
        ("1B", 1),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 8 GiB ", 8 * 2**30),
        ("8GB", 8_000_000_000),
        ("512MiB", 512 * 2**20),
        ("1.5KiB", 1536),
        ("0.3KB", 300),
        ("1024TiB", 2**50),
        ("unlimited", UNLIMITED),
        ("Unlimited", UNLIMITED),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a size"),
        ("  ", "not a size"),
        ("GiB", "not a size"),
        ("nan", "not a size"),
        ("inf", "not a size"),
        ("nanGiB", "not a size"),
        ("1e3GiB", "not a size"),
        ("8XiB", "not a size"),
        ("8G", "not a size"),
        ("8GiB4", "not a size"),
        ("٨GiB", "not a size"),
        ("-1GiB", "negative"),
        ("8", "GiB"),
        ("1025TiB", "beyond 1 PiB"),
        ("9" * 400 + "B", "beyond 1 PiB"),
    ],
)
def test_what_is_not_a_size(text, reason):
    with pytest.raises(BudgetError, match=reason) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)
