"""Sizes of memory as a person writes them."""

from __future__ import annotations

import re
from decimal import Decimal

from profiler.common.errors import BudgetError

UNLIMITED = 2**50
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE_HINT = "expected a size such as 8GiB, 8GB or 512MiB, or 0, or unlimited"


def parse_size(text: str) -> int:
    """Bytes named by `text`: a number with B, KB, MB, GB, TB or KiB, MiB, GiB, TiB; or `0`; or `unlimited`.

    Raises `BudgetError` for anything else, a negative size, or one beyond 1 PiB.
    """
    stripped = text.strip()
    if stripped.lower() == "unlimited":
        return UNLIMITED
    match = re.fullmatch(r"(-?)([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", stripped)
    if match is None or match[3].upper() not in {"", *_UNITS}:
        raise BudgetError(f"{text!r} is not a size; {_SIZE_HINT}")
    number, unit = Decimal(match[2]), match[3].upper()
    if match[1]:
        raise BudgetError(f"size {stripped} is negative; {_SIZE_HINT}")
    if not unit and number:
        raise BudgetError(f"size {stripped} has no unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB); {_SIZE_HINT}")
    size = number * _UNITS.get(unit, 1)
    if size > UNLIMITED:
        raise BudgetError(f"size {stripped} is beyond 1 PiB; {_SIZE_HINT}")
    return int(size)
