"""Tables of addresses: what compiled code makes of one are the arrays that it was made of."""

from typing import NamedTuple

import numpy as np
import pytest

from cpu_kernels.addresses import address_table, floats, reader_of
from cpu_kernels.compiled import kernel


class Parts(NamedTuple):
    vector: np.ndarray
    pair: tuple[np.ndarray, np.ndarray]
    last: np.ndarray


def parts(n, m):
    pair = np.arange(n * m, dtype=np.int16).reshape(n, m), np.arange(m, dtype=np.uint8)
    return Parts(np.arange(n, dtype=np.float32), pair, np.arange(m, dtype=np.int64))


read = reader_of(parts(2, 2))


@kernel
def _sums(table):  # type: ignore[no-untyped-def]
    found = read(table)
    a, b = found.pair
    sizes = found.vector.size, a.shape[0], a.shape[1], b.size, found.last.size
    for i in range(found.vector.size):
        found.vector[i] += 1
    return sizes, found.vector.sum(), a.sum(), b.sum(), found.last.sum()


@kernel
def _length(address, n):  # type: ignore[no-untyped-def]
    return len(floats(address, n))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 17), (5, 0), (0, 4)])
def test_compiled_code_finds_the_arrays(n, m):
    given = parts(n, m)
    found = _sums(address_table(given))
    a, b = given.pair
    assert found == ((n, n, m, m, m), given.vector.sum(), a.sum(), b.sum(), given.last.sum())
    assert (given.vector == np.arange(n) + 1).all()  # it is the caller's memory


def test_address_0_is_no_vector():
    vector = np.ones(3, np.float32)
    assert _length(vector.ctypes.data, 3) == 3
    assert _length(0, 3) == 0


@pytest.mark.parametrize("array", [np.zeros((4, 4))[:, ::2], np.zeros((2, 2, 2)), np.zeros(())])
def test_other_forms_are_refused(array):
    with pytest.raises(ValueError, match="contiguous arrays of 1 or 2 axes"):
        address_table((np.zeros(3), array))
