"""Reading packed folders: damage is found, foreign files are refused, advice and locks reach the system."""

import json
import shutil
from zlib import crc32

import numpy as np
import pytest
import torch
from model_cases import make_model
from packed_cases import pack, quiet
from safetensors.torch import save_file

from cpu_kernels.blocks import dequantize, quantize
from hybrid import packed
from hybrid.bundle import Bundle
from hybrid.errors import ArtifactError, InputError, ModelError
from hybrid.loader import ModelFolder
from hybrid.pack import Packer
from hybrid.packed import PACKED_DTYPES, PACKED_FILE, PackedModel, parts
from hybrid.packed_check import within_bounds

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make_model("llama-relu", folder)
    return folder


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("name", ["embedding", "layers.1.down", "layers.2.ffn_norm.weight", "order"])
def test_verification_finds_a_damaged_byte(model, tmp_path, name, dtype):
    out = tmp_path / "packed"
    pack(model, out, dtype)
    found = PackedModel.open(out)
    sums = {part.name: crc32(found.stored(part.name).tobytes()) for part in parts(found.spec)}
    folder = ModelFolder.open(model)
    packer = Packer(folder, Bundle.of(folder.path, folder.spec), dtype, quiet)
    packer.verify(out, sums)
    data = bytearray((out / PACKED_FILE).read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] ^= 0x10
    (out / PACKED_FILE).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"'{name}' did not read back"):
        packer.verify(out, sums)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("d", [1, 17, 128, 4095])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 300.0])
def test_bounds_hold_for_what_quantize_makes(kind, d, scale):
    rng = np.random.default_rng(d)
    weight = (rng.standard_normal((5, d)) * scale * rng.choice([1, 30], (5, d))).astype(np.float32)
    found = dequantize(quantize(weight, kind), d)
    assert within_bounds(found, weight, kind)
    step = np.abs(weight).max() / {"int8": 127, "int4": 7}[kind]
    worse = found.copy()
    worse[4, d // 2] += 8 * max(step, 2**-18)
    assert not within_bounds(worse, weight, kind)


def test_locking_and_advice(model, tmp_path, monkeypatch):
    pack(model, tmp_path / "packed")
    found = PackedModel.open(tmp_path / "packed")
    for learned in (True, False):
        found.advise(learned)
    found.matrix("embedding", 131, 48).widen()
    assert 0 < found.resident_share() <= 1

    class Refusing:
        mlock = mincore = staticmethod(lambda *arguments: -1)

    monkeypatch.setattr(packed, "_libc", Refusing)
    with pytest.raises(InputError, match="ulimit -l"):
        found.lock()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(model, tmp_path, keep):
    pack(model, tmp_path / "packed")
    path = tmp_path / "packed" / PACKED_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((ArtifactError, ModelError), match=PACKED_FILE) as caught:
        PackedModel.open(tmp_path / "packed")
    assert "\n" not in str(caught.value)


def test_a_foreign_file_and_another_config_are_refused(model, tmp_path):
    out = tmp_path / "packed"
    pack(model, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(ModelError, match="not the one that was packed"):
        PackedModel.open(out)
    save_file({"x": torch.zeros(3)}, out / PACKED_FILE)
    with pytest.raises(ArtifactError, match="is not a packed model"):
        PackedModel.open(out)
