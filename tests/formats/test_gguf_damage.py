"""GGUF files cut short anywhere, or with a bit turned anywhere in their header: opened, or refused in one line."""

import random

import pytest
from gguf_cases import make

from hybrid.errors import InputError
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.model.loader import ModelFolder


def refused(path, data):
    """Whether a file of `data` cannot be used; then in one line and with exit code 2."""
    path.write_bytes(data)
    try:
        folder = ModelFolder.open(path)
        folder.codec.encode("hello")
        assert folder.defaults.settings.temperature == 0
    except InputError as error:
        assert error.exit_code == 2 and "\n" not in str(error) and len(str(error)) < 700
        return True
    return False


@pytest.fixture
def whole(tmp_path):
    pytest.importorskip("gguf")
    return make(tmp_path, "q8_0").read_bytes()


def test_cut_at_every_kilobyte(tmp_path, whole):
    assert not refused(tmp_path / "cut.gguf", whole)
    assert all(refused(tmp_path / "cut.gguf", whole[:size]) for size in range(0, len(whole), 1024))


def test_a_bit_turned_in_the_header(tmp_path, whole):
    tensors = GGUFCheckpoint(tmp_path / "m.gguf").file.tensors.values()
    header = min(tensor.start for tensor in tensors)
    rng, count = random.Random(0), 0
    for place in rng.sample(range(8 * header), 300):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        count += refused(tmp_path / "turned.gguf", damaged)
    assert 150 < count < 300  # a turned bit of a token's text or of the norms' epsilon is another valid file
