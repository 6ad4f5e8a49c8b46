"""PowerInfer's files cut short anywhere, or with a bit turned in a field of their header; and its other files."""

import random
import struct

import pytest
from gguf_cases import header
from powerinfer_cases import changed, prepared

from hybrid.errors import InputError, ModelError
from hybrid.formats.bundle import Bundle
from hybrid.formats.folder import is_gguf
from hybrid.formats.gguf_file import GGUFFile
from hybrid.model.loader import ModelFolder
from hybrid.model.powerinfer_import import import_artefacts
from hybrid.offline.export import export
from profiler.common.progress import no_progress

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    return export(prepared(folder / "m", layers=2), folder / "out", "f16", no_progress).model


def refused(path, data, bundle):
    """Whether a file of `data` cannot be used; then in one line and with exit code 2."""
    path.write_bytes(data)
    try:
        folder = ModelFolder.open(path)
        folder.codec.encode("hello")
        assert folder.defaults.settings.temperature == 0
        import_artefacts(folder, Bundle(bundle))
    except InputError as error:
        assert error.exit_code == 2 and "\n" not in str(error) and len(str(error)) < 700
        return True
    return False


def test_cut_at_every_kilobyte(exported, tmp_path):
    whole, cut = exported.read_bytes(), tmp_path / "cut.powerinfer.gguf"
    assert not refused(cut, whole, tmp_path / "b")
    assert all(refused(cut, whole[:size], tmp_path / "b") for size in range(0, len(whole), 1024))


def fields(data):
    """Where in a header its numbers and keys lie: magic, counts, keys, types, and all of tensors' infos."""
    at, found = 24, list(range(24))

    def take(count):
        nonlocal at
        found.extend(range(at, at + count))
        at += count

    def text(count_it=True):
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        take(8)
        if count_it:
            found.extend(range(at, at + length))
        at += length

    tensors, entries = struct.unpack_from("<QQ", data, 8)
    for _ in range(entries):
        text()
        (kind,) = struct.unpack_from("<I", data, at)
        take(4)
        if kind == 8:
            text(False)
        elif kind != 9:
            take({4: 4, 5: 4, 6: 4, 7: 1, 10: 8}[kind])
        else:
            inner, count = struct.unpack_from("<IQ", data, at)
            take(12)
            for _ in range(count):
                at += struct.unpack_from("<Q", data, at)[0] + 8 if inner == 8 else 4
    for _ in range(tensors):
        text()
        (dimensions,) = struct.unpack_from("<I", data, at)
        take(4 + 8 * dimensions + 12)
    return found


def test_a_bit_turned_in_each_field_of_the_header(exported, tmp_path):
    whole, path = exported.read_bytes(), tmp_path / "turned.powerinfer.gguf"
    rng, places = random.Random(0), fields(whole)
    chosen = rng.sample(places, 300)
    count = 0
    for place in chosen:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        count += refused(path, damaged, tmp_path / "b")
    assert count > 200  # a bit of a key that may be missing, or of a number such as RoPE's, is another valid file


def test_types_have_the_numbers_of_their_time(exported, tmp_path):
    index = GGUFFile.open(exported.with_name(f"{exported.name}.generated.gpuidx"))
    assert index.powerinfer and {tensor.type for tensor in index.tensors.values()} == {"I32"}
    tensors = [(f"t{number}", (1,), number, 32 * at) for at, number in enumerate((16, 17, 18))]
    path = tmp_path / "types.gguf"
    path.write_bytes(b"PWRI" + header(tensors)[4:] + bytes(200))
    assert [tensor.type for tensor in GGUFFile.open(path).tensors.values()] == ["I8", "I16", "I32"]
    for number in (19, 26, 30):
        path.write_bytes(b"PWRI" + header([("t", (256,), number, 0)])[4:] + bytes(2000))
        with pytest.raises(ModelError, match=f"is of type {number}, which is not known"):
            GGUFFile.open(path)


def test_the_index_is_no_model(exported):
    with pytest.raises(
        ModelError, match=r"unknown PowerInfer architecture 'generic\.gpu_index'; known are llama, bamboo"
    ):
        ModelFolder.open(exported.with_name(f"{exported.name}.generated.gpuidx"))


@pytest.mark.parametrize("name", ["opt", "qwen2"])
def test_its_other_architectures_are_named(exported, tmp_path, name):
    with pytest.raises(ModelError, match=f"unknown PowerInfer architecture '{name}'; known are llama, bamboo"):
        ModelFolder.open(changed(exported, tmp_path / "x.gguf", {"general.architecture": name}, {}))


def test_a_file_is_known_by_its_beginning(exported, tmp_path):
    (tmp_path / "model.bin").write_bytes(exported.read_bytes()[:4])
    assert is_gguf(tmp_path / "model.bin")


def test_tensors_of_more_layers_have_no_place(exported, tmp_path):
    made = changed(exported, tmp_path / "x.gguf", {"llama.block_count": 1}, {})
    with pytest.raises(ModelError, match="has no place in a llama model of 1 layers"):
        ModelFolder.open(made)


@pytest.mark.parametrize("kind", [2, 8])
def test_vectors_are_floats(exported, tmp_path, kind):
    """A type turned to one of blocks, whose bytes are as many as any."""
    data = bytearray(exported.read_bytes())
    name = b"blk.1.ffn_norm.weight"
    data[data.index(name) + len(name) + 12] = kind
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"'blk.1.ffn_norm.weight' is a vector of \w+, expected one of F32, F16, BF16"):
        ModelFolder.open(tmp_path / "x.gguf")
