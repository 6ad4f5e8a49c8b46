"""Artefact files: what is written is read back, nothing damaged is, and a write is whole or not at all."""

import contextlib
import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
from artifact_cases import cut_off, flipped, flipped_headers, flipped_tensors, header_end, write_version_1
from safetensors.numpy import load_file

from profiler.common.artifact import (
    ArtifactHeader,
    TensorWriter,
    atomic_write,
    digest_of,
    open_artifact,
    read_header,
    read_tensors,
    write_tensors,
)
from profiler.common.errors import ArtifactError, ArtifactMismatchError, InputError
from profiler.common.tensor_file import Entry

HEADER = ArtifactHeader("thing", "0123456789abcdef", {"seed": 3, "corpus": "ü"})
TENSORS = {
    "flags": np.array([True, False, True]),
    "wide": np.arange(12, dtype=np.int64).reshape(3, 4),
    "half": np.linspace(-1, 1, 7, dtype=np.float16),
    "empty": np.zeros((2, 0, 5), np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "thing.safetensors", HEADER, TENSORS)
    return tmp_path / "thing.safetensors"


def read(path, kind="thing", fingerprint=HEADER.model_fingerprint):
    return read_tensors(path, kind, fingerprint, "hybrid make")


def refused(path, reason="hybrid make"):
    """Reading `path` ends in one line that names the file and matches `reason`."""
    with pytest.raises(InputError, match=reason) as caught:
        read(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_round_trip_and_the_format_is_safetensors(path):
    header, tensors = read(path)
    assert header == HEADER and tensors.keys() == TENSORS.keys()
    others = load_file(path)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype and np.array_equal(tensors[name], array)
        assert np.array_equal(others[name], array)
    with open_artifact(path, "thing", None, "") as file:
        assert file.digests["wide"] == digest_of([TENSORS["wide"].data])
        assert file.places["wide"].start % 8 == file.places["half"].start % 2 == 0
        file.check()


def test_a_file_cut_off_anywhere_is_refused(path):
    for what, data in cut_off(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match="rebuild it with: hybrid make"):
            pytest.fail(f"{what}: {read(path)}")


def test_a_bit_flipped_in_any_field_of_the_header_is_found_without_reading_a_tensor(path):
    found = list(flipped_headers(path.read_bytes()))
    assert len(found) > 40
    for what, data in found:
        path.write_bytes(data)
        with pytest.raises(InputError, match=path.name):
            pytest.fail(f"{what}: {read_header(path, 'thing', HEADER.model_fingerprint, 'hybrid make')}")


def test_a_bit_flipped_in_any_tensor_is_found(path):
    found = list(flipped_tensors(path))
    assert len(found) == 12
    for _, data in found:
        path.write_bytes(data)
        read_header(path, "thing", HEADER.model_fingerprint, "hybrid make")
        refused(path, "damaged: tensor '.*' is not what was written; rebuild it with: hybrid make")


def test_flips_in_blanks_between_header_and_data_change_nothing_that_is_read(path):
    data = path.read_bytes()
    for at in range(len(data[: header_end(data)].rstrip()), header_end(data)):
        path.write_bytes(flipped(data, at))
        with contextlib.suppress(ArtifactError):  # of a JSON that goes on there
            assert read(path)[0] == HEADER


def test_another_kind_model_or_version(path, tmp_path):
    with pytest.raises(ArtifactError, match="is a thing, expected a toy; run: hybrid make"):
        read(path, kind="toy")
    with pytest.raises(ArtifactMismatchError, match="made for model 0123456789abcdef, this model is other"):
        read(path, fingerprint="other")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"format_version\\": 2', b'\\"format_version\\": 3'))
    refused(path, "format version 3, this build reads up to 2; upgrade hybrid, or rebuild")
    path.write_bytes(data.replace(b'\\"format_version\\": 2', b'\\"format_version\\": 1'))
    refused(path, "its header is damaged")
    refused(tmp_path / "none", "is missing; make it with: hybrid make")
    refused(tmp_path, "is missing")


def test_version_1_has_no_digests_and_is_read(tmp_path):
    path = tmp_path / "old.safetensors"
    write_version_1(path, HEADER, TENSORS)
    header, tensors = read(path)
    assert header == replace(HEADER, format_version=1) and header.key == HEADER.key
    assert all(np.array_equal(tensors[name], array) for name, array in TENSORS.items())
    with open_artifact(path, "thing", None, "") as file:
        assert file.digests is None
        file.check()
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 2'))
    refused(path, "is not a thing of this program")


def raw(table, data, path):
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(start, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, "tensor 'b' overlaps another"),
        ({"a": tensor(0, 2), "b": tensor(4, 6)}, "or follows a gap"),
        ({"a": tensor(0, 6, "F32", [2])}, "has 6 bytes, expected 8 for F32"),
        ({"a": tensor(0, 6, shape=[6.0])}, "has '6.0', expected whole numbers"),
        ({"a": tensor(0, 6, shape=[True, 6])}, "expected dtype, shape and two data_offsets"),
        ({"a": [0, 6]}, "expected dtype, shape and two data_offsets"),
        ({"\ud800": tensor(0, 6)}, "surrogates"),
        ({"a": tensor(0, 10**30)}, "is truncated or padded"),
        ({"a": tensor(0, 5)}, "is truncated or padded"),
        ({"a": tensor(0, 6, "F3", [2])}, "does not say so"),
    ],
)
def test_tables_that_contradict_themselves_or_the_file(tmp_path, tensors, reason):
    path = tmp_path / "x.safetensors"
    raw(tensors, bytes(6), path)
    refused(path, reason)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"hybrid": 3}}',
        b'{"__metadata__": {"hybrid": "[1]"}}',
        b'{"__metadata__": {"hybrid": "' + b"[" * 50_000 + b'"}}',
        b'{"__metadata__": {"hybrid": "{}", "hybrid": "{}"}}',
        b'{"__metadata__": {}}',
        b"{}",
        b"",
    ],
)
def test_headers_that_are_none(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(path, "is not a thing of this program")


@pytest.mark.parametrize(
    "change",
    [{"kind": 3}, {"made_from": []}, {"format_version": True}, {"format_version": 0}, {"package_version": None}],
)
def test_header_fields_of_other_types(tmp_path, change):
    path = tmp_path / "old.safetensors"
    write_version_1(path, HEADER, TENSORS)
    fields = {name: getattr(HEADER, name) for name in HEADER.__dataclass_fields__} | {"format_version": 1} | change
    raw({"__metadata__": {"hybrid": json.dumps(fields)}}, b"", path)
    refused(path, "its header is damaged")


def test_booleans_of_an_old_file_that_are_none(tmp_path):
    path = tmp_path / "old.safetensors"
    write_version_1(path, HEADER, {"flags": np.array([1, 2], np.uint8).view(bool)})
    refused(path, "'flags' is not of booleans")


def test_a_writer_keeps_to_its_entries(tmp_path):
    entries = [Entry("a", "U8", (3,)), Entry("b", "F32", (2,))]
    three, two = np.arange(3, dtype=np.uint8), np.ones(2, np.float32)
    with (tmp_path / "x").open("wb") as file:
        writer = TensorWriter(file, HEADER, entries, alignment=64)
        with pytest.raises(ValueError, match="the turn of a"):
            writer.add("b", [three])
    with (tmp_path / "x").open("wb") as file:
        writer = TensorWriter(file, HEADER, entries, alignment=64)
        writer.add("a", [three[:1], three[1:]])
        with pytest.raises(ValueError, match="wrote 4 bytes of b"):
            writer.add("b", [two[:1]])
    with (tmp_path / "x").open("wb") as file:
        writer = TensorWriter(file, HEADER, entries, alignment=64)
        writer.add("a", [three[:1], three[1:]])
        writer.add("b", [two])
        writer.finish()
    header, tensors = read(tmp_path / "x")
    assert header == HEADER and tensors.keys() == {"a", "b"} and (tensors["a"] == three).all()
    with open_artifact(tmp_path / "x", "thing", None, "") as file:
        assert all(place.start % 64 == 0 for place in file.places.values())


def test_a_file_that_shrinks_while_it_is_open_is_refused(path):
    write_tensors(path, HEADER, TENSORS | {"large": np.zeros(100_000)})
    with open_artifact(path, "thing", None, "hybrid make") as file:
        os.truncate(path, path.stat().st_size - 3)
        with pytest.raises(ArtifactError, match="it ends within a tensor"):
            file.check()


def test_a_failed_write_leaves_what_was_there(path):
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(ArtifactError, match=r"cannot write .*choose another folder"):
        write_tensors(path / "inside", HEADER, TENSORS)


def test_what_is_not_a_file_is_not_replaced_by_one(tmp_path):
    """As root, a rename would put a file in the place of /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ArtifactError, match=f"cannot write {pipe}: it is not a file; name another"), atomic_write(pipe):
        pass
    assert stat.S_ISFIFO(pipe.stat().st_mode) and [path.name for path in tmp_path.iterdir()] == ["pipe"]
