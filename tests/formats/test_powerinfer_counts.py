"""PowerInfer's activation counts, and files that are something else."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from hybrid.errors import ModelError
from hybrid.formats.powerinfer_counts import digest_of_counts, read_counts

N = 7


class Code:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def saved(folder, *layers):
    for number, value in enumerate(layers):
        torch.save(value, folder / f"activation_{number}.pt")
    return folder


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.uint8])
def test_layers_are_read_by_number(tmp_path, dtype):
    """10 comes after 9, not after 1."""
    values = [torch.arange(N).to(dtype) + layer for layer in range(12)]
    found = read_counts(saved(tmp_path, *values), 12, N)
    assert found.dtype == np.int64 and found.tolist() == [[layer + n for n in range(N)] for layer in range(12)]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"counts": torch.ones(N)}, "holds a dict"),
        ([1] * N, "holds a list"),
        (torch.ones(N + 1), r"has shape \[8\]"),
        (torch.ones(1, N), r"has shape \[1, 7\]"),
        (torch.tensor(3), r"has shape \[\]"),
        (torch.ones(1).expand(N, 10**9), r"has shape \[7, 1000000000\]"),
        (torch.full((N,), 0.5), r"has 0.5"),
        (torch.full((N,), -1), r"has -1.0"),
        (torch.full((N,), torch.nan), r"has nan"),
        (torch.full((N,), torch.inf), r"has inf"),
        (torch.full((N,), 2**41), r"has 2199023255552.0"),
        (torch.ones(N, dtype=torch.bool), r"is of type torch.bool"),
        (torch.ones(N, dtype=torch.complex64), r"is of type torch.complex64"),
        (torch.ones(N).to_sparse(), "holds no plain tensor"),
        (torch.ones(N, device="meta"), "holds no plain tensor|cannot be read"),
        (torch.ones(100_000), r"has 400,\d+ bytes"),
        (Code(), r"cannot be read \(UnpicklingError\)"),
        (None, "holds a NoneType"),
    ],
)
def test_a_foreign_file_is_one_line(tmp_path, monkeypatch, value, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=problem) as caught:
        read_counts(saved(tmp_path, value), 1, N)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert "expected whole counts of 7 neurons" in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_bytes_that_torch_did_not_write(tmp_path):
    for data in (b"", b"x" * 99, pickle.dumps(Code()), b"PK\x03\x04" + bytes(60)):
        (tmp_path / "activation_0.pt").write_bytes(data)
        with pytest.raises(ModelError, match=r"cannot be read \(BadZipFile\)"):
            read_counts(tmp_path, 1, N)


def test_what_unpacks_to_more_than_counts_is_not_read(tmp_path):
    path = saved(tmp_path, torch.ones(N)) / "activation_0.pt"
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(10**7))
    assert path.stat().st_size < 30_000
    with pytest.raises(ModelError, match=r"has 10,00\d,\d+ bytes"):
        read_counts(tmp_path, 1, N)


def test_a_file_cut_or_turned_is_counts_or_one_line(tmp_path):
    path = saved(tmp_path, torch.arange(N)) / "activation_0.pt"
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    damaged = [whole[:size] for size in range(0, len(whole), 64)]
    for place in rng.integers(0, 8 * len(whole), 200):
        turned = bytearray(whole)
        turned[place // 8] ^= 1 << place % 8
        damaged.append(bytes(turned))
    for data in damaged:
        path.write_bytes(data)
        try:
            read_counts(tmp_path, 1, N)
        except ModelError as error:
            refused += "\n" not in str(error)
    assert refused > len(damaged) // 3


def test_counts_cut_out_of_all_layers_hold_them_all(tmp_path):
    every = torch.arange(3 * N).reshape(3, N)
    assert read_counts(saved(tmp_path, *every), 3, N).tolist() == every.tolist()


def test_one_that_is_missing_is_named(tmp_path):
    saved(tmp_path, torch.ones(N))
    for read in (read_counts, digest_of_counts):
        with pytest.raises(ModelError, match=r"cannot read .*activation_1\.pt: No such file"):
            read(tmp_path, 2, N)


def test_the_digest_tells_other_counts(tmp_path):
    assert digest_of_counts(tmp_path / "none", 1, N) is None
    first = digest_of_counts(saved(tmp_path, torch.ones(N)), 1, N)
    assert first == digest_of_counts(tmp_path, 1, N)
    assert first != digest_of_counts(saved(tmp_path, torch.zeros(N)), 1, N)
