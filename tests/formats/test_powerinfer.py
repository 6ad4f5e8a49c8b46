"""PowerInfer's container, byte for byte, held against a reader of its own."""

import struct

import numpy as np
import pytest
from powerinfer_cases import read_file

from hybrid.formats.powerinfer import Tensor, stored_bytes, write

KINDS = ("f32", "f16", "q4_0", "q8_0", "i32")


def weights(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(name, values, kind):
    return Tensor(name, values.shape, kind, lambda: values)


def test_the_first_bytes(tmp_path):
    write(tmp_path / "f", {"a": 7}, [tensor("t", np.arange(3, dtype=np.int32), "i32")])
    head = b"PWRI" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
    info = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 3, 18, 0)
    data = head + info
    assert (tmp_path / "f").read_bytes() == data + bytes(-len(data) % 32) + struct.pack("<3i", 0, 1, 2) + bytes(20)


def test_metadata_and_tensors_come_back(tmp_path):
    metadata = {"u32": 3, "f32": 0.5, "yes": True, "text": "sparse é", "u64": np.uint64(2**40), "list": ["a", "", "é"]}
    arrays = {"i": np.array([1, -2], np.int32), "f": np.array([0.5], np.float32)}
    wide = weights((6, 64))
    tensors = [tensor(kind, wide if kind != "i32" else np.arange(7, dtype=np.int32), kind) for kind in KINDS]
    done = []
    write(tmp_path / "f", metadata | arrays, tensors, done.append)
    about, found, kinds = read_file(tmp_path / "f")
    assert {name: about[name] for name in metadata} == metadata
    assert all(about[name].tolist() == values.tolist() for name, values in arrays.items())
    assert kinds == {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "i32": 18} and done == [1] * 5
    assert list(found) == list(KINDS) and found["i32"].tolist() == list(range(7))
    assert np.array_equal(found["f32"], wide) and np.array_equal(found["f16"], wide.astype(np.float16))
    errors = {kind: float(np.sqrt(np.square(found[kind] - wide).mean())) for kind in ("q8_0", "q4_0")}
    assert 0.002 < errors["q8_0"] < 0.007 and 0.05 < errors["q4_0"] < 0.1
    assert (tmp_path / "f").stat().st_size % 32 == 0


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f16"])
def test_the_gguf_package_reads_the_same_numbers(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    write(tmp_path / "f", {"general.architecture": "llama"}, [tensor("a", weights((4, 96)), kind)])
    _, found, _ = read_file(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "g").write_bytes(b"GGUF" + data[4:])
    (theirs,) = gguf.GGUFReader(tmp_path / "g").tensors
    assert np.array_equal(gguf.quants.dequantize(theirs.data, theirs.tensor_type), found["a"].astype(np.float32))


@pytest.mark.parametrize(("kind", "nbytes"), [("f32", 256), ("f16", 128), ("i32", 256), ("q4_0", 36), ("q8_0", 68)])
def test_bytes_of_a_row(kind, nbytes):
    assert stored_bytes(kind, 64) == nbytes
    values = np.zeros((1, 64), np.int32 if kind == "i32" else np.float32)
    assert len(tensor("t", values, kind).encoded()) == nbytes


@pytest.mark.parametrize(("value", "kind"), [(1e5, "f16"), (np.inf, "f16"), (np.nan, "f16")])
def test_what_a_type_cannot_hold_is_refused(value, kind):
    with pytest.raises(ValueError, match="tensor 'big' has values that f16 cannot hold"):
        tensor("big", np.full((2, 2), value, np.float32), kind).encoded()


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"tensor 't' has shape \[2, 2\], expected \[4\]"):
        Tensor("t", (4,), "f32", lambda: np.zeros((2, 2))).encoded()
