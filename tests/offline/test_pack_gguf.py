"""Packing GGUF files: codes are taken over, a packed folder is whole, and what rounding costs is told."""

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_cases import make, write
from packed_cases import pack, quiet

from hybrid.cli import cli
from hybrid.formats.bundle import EMBEDDED_MODEL, Bundle
from hybrid.formats.packed import PackedModel, parts
from hybrid.model.gguf_run import open_run_form
from hybrid.model.loader import ModelFolder
from hybrid.offline.pack import Packer

pytest.importorskip("gguf")


@pytest.mark.parametrize(("kind", "dtype"), [("q8_0", "int8"), ("q4_0", "int4")])
def test_a_packed_file_has_the_bytes_of_the_run_time_form(tmp_path, kind, dtype):
    path = make(tmp_path, kind)
    folder = ModelFolder.open(path)
    run = open_run_form(folder.spec, folder.checkpoint, None, tmp_path / "run")
    result = pack(path, tmp_path / "packed", dtype)
    packed = PackedModel.open(tmp_path / "packed")
    assert packed.spec == folder.spec
    for part in parts(packed.spec):
        np.testing.assert_array_equal(packed.stored(part.name), run.stored(part.name))
    assert result.errors.keys() == {"down"} and 0 < result.errors["down"] < {"int8": 0.01, "int4": 0.12}[dtype]


def test_a_packed_folder_answers_as_its_file_does(tmp_path):
    path = write(EMBEDDED_MODEL, tmp_path / "m.gguf", "q8_0")
    pack(path, tmp_path / "packed", "int8")
    file, folder = ModelFolder.open(path), ModelFolder.open(tmp_path / "packed")
    assert folder.defaults.end_tokens == file.defaults.end_tokens
    messages = [{"role": "user", "content": "Hi"}]
    assert folder.codec.encode_chat(messages) == file.codec.encode_chat(messages)
    again = Packer(file, Bundle.of(file.path, file.spec), "int8", quiet).pack(tmp_path / "packed")
    assert not again.written


def test_four_bits_are_held_by_eight(tmp_path):
    result = pack(make(tmp_path, "q4_0"), tmp_path / "packed", "int8")
    assert result.errors.keys() == {"down"} and result.errors["down"] < 0.01


def test_other_types_are_rounded_and_the_command_says_at_what_cost(tmp_path):
    path = make(tmp_path, "q5_1")
    result = CliRunner().invoke(cli, ["pack", str(path), "--dtype", "int8"])
    assert result.exit_code == 0 and (tmp_path / "m.hybrid" / "packed-int8" / "packed.safetensors").is_file()
    line = next(line for line in result.stderr.splitlines() if line.startswith("note: rounded once more"))
    for part in ("embedding", "qkv", "out", "gate", "up", "down", "head"):
        assert f"{part} 0." in line
