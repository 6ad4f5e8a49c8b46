"""Low-rank differences, rounded, written and added."""

import re

import numpy as np
import pytest
import torch

from hybrid.errors import InputError
from hybrid.formats.difference import Difference, rounded, write_difference


def factors(seed=0, rank=4, m=40, n=24):
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, 2, rank)  # what training leaves: directions of very different lengths
    return torch.randn(rank, m, generator=g) * spread[:, None], torch.randn(n, rank, generator=g) / spread


@pytest.mark.parametrize(("bits", "most"), [(8, 0.015), (6, 0.06), (4, 0.28)])
def test_rounding_costs_what_its_bits_say(bits, most):
    into, out = factors()
    parts = rounded(into, out, bits)
    found = (torch.from_numpy(parts[1]).float().T * torch.from_numpy(parts[2])) @ torch.from_numpy(parts[0]).float()
    assert most / 4 < float((found - out @ into).norm() / (out @ into).norm()) < most
    assert max(np.abs(part).max() for part in parts[:2]) == 2 ** (bits - 1) - 1


def test_a_matrix_gets_its_difference_and_a_vector_is_replaced(tmp_path):
    into, out = factors()
    norm = torch.linspace(-1, 1, 40)
    write_difference(tmp_path / "d.npz", {"a.q": (into, out)}, {"a.norm": norm.bfloat16()}, 8)
    found = Difference.load(tmp_path / "d.npz")
    assert found.unused == {"a.q", "a.norm"}
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    change = found.applied("a.q", weight) - weight
    assert float((change - out @ into).norm() / (out @ into).norm()) < 0.015
    assert found.applied("a.norm", torch.ones(40).bfloat16()).equal(norm.bfloat16())
    assert found.applied("b.q", weight) is weight
    assert not found.unused


def test_a_difference_of_another_shape_is_named(tmp_path):
    write_difference(tmp_path / "d.npz", {"a.q": factors()}, {}, 8)
    with pytest.raises(InputError, match=r"d\.npz does not fit tensor 'a\.q' \[8, 40\]"):
        Difference.load(tmp_path / "d.npz").applied("a.q", torch.zeros(8, 40))


@pytest.mark.parametrize("keep", [0, 100, 0.9])
def test_a_cut_file_is_one_line(keep, tmp_path):
    path = tmp_path / "d.npz"
    write_difference(path, {"a.q": factors()}, {}, 8)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(InputError, match=f"{re.escape(str(path))} cannot be read .*install this package again"):
        Difference.load(path)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Difference.load(tmp_path / "none.npz")
