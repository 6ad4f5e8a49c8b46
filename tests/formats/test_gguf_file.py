"""Headers of GGUF files: what is read, and one line for whatever contradicts the file."""

import struct

import numpy as np
import pytest
from gguf_cases import header

from hybrid.errors import ModelError
from hybrid.formats.gguf_file import GGUFFile, stem_of

F32, Q8_0 = 0, 8
TENSORS = [("a", (3, 2), F32, 0), ("b", (64,), Q8_0, 32)]


def write(path, head, data=bytes(32 + 68)):
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def test_metadata_and_tensors_are_read(tmp_path):
    names = [("x", 8, text("gr\u00fcn")), ("n", 4, struct.pack("<I", 7)), ("f", 6, struct.pack("<f", 0.5))]
    lists = [("t", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")), ("i", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3))]
    head = header(TENSORS, [*names, ("yes", 7, b"\1"), *lists])
    file = GGUFFile.open(write(tmp_path / "m.gguf", head))
    found = dict(file.metadata)
    np.testing.assert_array_equal(found.pop("i"), [1, -2, 3])
    assert found == {"x": "gr\u00fcn", "n": 7, "f": 0.5, "yes": True, "t": ["a", ""]}
    base = len(head) + -len(head) % 32
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.type, a.shape, a.start - base, a.end - base) == ("F32", (2, 3), 0, 24)
    assert (b.type, b.shape, b.start - base, b.end - base) == ("Q8_0", (64,), 32, 100)


def test_all_parts_are_one_model_whichever_is_named(tmp_path):
    paths = [tmp_path / f"big.v1-0000{n}-of-00002.gguf" for n in (1, 2)]
    write(paths[0], header(TENSORS[:1], [("k", 4, struct.pack("<I", 1))]))
    write(paths[1], header([("b", (64,), Q8_0, 0)]))
    for path in paths:
        file = GGUFFile.open(path)
        assert file.metadata == {"k": 1} and file.path == paths[0] and stem_of(path) == "big.v1"
        assert {name: tensor.path for name, tensor in file.tensors.items()} == {"a": paths[0], "b": paths[1]}
    paths[1].unlink()
    with pytest.raises(
        ModelError, match=r"big.v1-00002-of-00002.gguf is missing; big.v1-00001-of-00002.gguf is one of 2"
    ):
        GGUFFile.open(paths[0])


ONE = struct.pack("<I", 1)
BAD = {
    "begins": b"GGML" + header()[4:],
    "of version 4": header(version=4),
    "twice": header([TENSORS[0], ("a", (1,), F32, 32)]),
    "its metadata has 'k' twice": header(metadata=[("k", 4, ONE), ("k", 4, ONE)]),
    "type 13": header(metadata=[("k", 13, ONE)]),
    "array of type 9": header(metadata=[("k", 9, struct.pack("<IQ", 9, 0))]),
    "1,000,000,000,000 texts": header(metadata=[("k", 9, struct.pack("<IQ", 8, 10**12))]),
    "more than its": header(metadata=[("k", 9, struct.pack("<IQ", 0, 2**60))]),
    "is of type 99": header([("a", (3,), 99, 0)]),
    "are blocks of 32": header([("a", (33,), Q8_0, 0)]),
    "has 5 dimensions": header([("a", (1,) * 5, F32, 0)]),
    "over another": header([("a", (9,), F32, 0), ("b", (1,), F32, 32)]),
    "or not on 32 bytes": header([("a", (1,), F32, 4)]),
    "tensor 'a' ends at": header([("a", (2**62,), F32, 0)]),
    "power of two": header(metadata=[("general.alignment", 4, struct.pack("<I", 24))]),
    "a tensor's name has": header([("a" * 257, (1,), F32, 0)]),
    "ends within its header": header(metadata=[("k", 8, struct.pack("<Q", 2**63))]),
    "can't decode": header(metadata=[("k", 8, struct.pack("<Q", 1) + b"\xff")]),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_damaged_header_is_one_line(tmp_path, problem):
    path = write(tmp_path / "m.gguf", BAD[problem])
    with pytest.raises(ModelError, match=f"{path} is not a whole GGUF file .*{problem}.*; fetch it again") as error:
        GGUFFile.open(path)
    assert "\n" not in str(error.value)


def test_every_truncation_is_found(tmp_path):
    whole = write(tmp_path / "m.gguf", header(TENSORS, [("x", 8, text("abc"))])).read_bytes()
    GGUFFile.open(tmp_path / "m.gguf")
    for size in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelError, match="fetch it again"):
            GGUFFile.open(tmp_path / "m.gguf")


def test_parts_that_say_another_number_are_refused(tmp_path):
    write(tmp_path / "m.gguf", header(TENSORS, [("split.count", 2, struct.pack("<H", 3))]))
    with pytest.raises(ModelError, match=r"'split.count' is 3, found 1; fetch all parts"):
        GGUFFile.open(tmp_path / "m.gguf")
