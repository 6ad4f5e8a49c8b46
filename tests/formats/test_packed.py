"""Reading packed folders: damage is found, foreign files are refused, advice and locks reach the system."""

import json
import shutil

import numpy as np
import pytest
import torch
from model_cases import make_model
from packed_cases import pack, place, quiet
from safetensors.torch import save_file

from cpu_kernels.blocks import FORMATS, dequantize, quantize
from hybrid.cli import main
from hybrid.errors import ArtifactError, InputError, ModelError
from hybrid.formats import packed
from hybrid.formats.bundle import Bundle
from hybrid.formats.packed import PACKED_DTYPES, PACKED_FILE, PackedModel
from hybrid.model.loader import ModelFolder
from hybrid.offline.pack import Packer
from hybrid.offline.pack_check import within_bounds

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
    folder = ModelFolder.open(model)
    packer = Packer(folder, Bundle.of(folder.path, folder.spec), dtype, quiet)
    packer.verify(out)
    data = bytearray((out / PACKED_FILE).read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] ^= 0x10
    (out / PACKED_FILE).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"'{name}' did not read back"):
        packer.verify(out)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("d", [1, 17, 128, 4095])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 300.0])
def test_bounds_hold_for_what_quantize_makes(kind, d, scale):
    rng = np.random.default_rng(d)
    weight = (rng.standard_normal((5, d)) * scale * rng.choice([1, 30], (5, d))).astype(np.float32)
    found = dequantize(quantize(weight, kind), d)
    assert within_bounds(found, weight, FORMATS[kind])
    step = np.abs(weight).max() / {"int8": 127, "int4": 7}[kind]
    worse = found.copy()
    worse[4, d // 2] += 8 * max(step, 2**-18)
    assert not within_bounds(worse, weight, FORMATS[kind])


def test_locking_and_advice(model, tmp_path, monkeypatch):
    pack(model, tmp_path / "packed")
    found = PackedModel.open(tmp_path / "packed")
    for learned in (True, False):
        found.advise(learned)
    found.prefetch(2)
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


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away", "over", "hills"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 25)) for n in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def hybrid(capfd, *arguments):
    """Run the command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code or 0, *capfd.readouterr()


def test_a_packed_folder_is_a_model_for_every_command(model, corpus, tmp_path, capfd):
    quick = ["--corpus", corpus, "--tokens", "2000", "--window", "32"]
    planned = ["--hardware", "default", "--vram-budget", "4MiB"]
    assert hybrid(capfd, "prepare", model, *quick, *planned)[0] == 0
    out = tmp_path / "packed"
    assert hybrid(capfd, "pack", model, "--dtype", "bf16", "-o", out)[0] == 0
    order = PackedModel.open(out).order
    assert (order != np.arange(order.shape[1])).any(), "the test needs an order of its own"
    evaluation = ["--corpus", corpus, "--tokens", "256", "--context", "32"]
    tables = [hybrid(capfd, "eval", folder, *evaluation)[1].splitlines() for folder in (model, out)]
    rows, packed = ({line.split()[0]: line.split() for line in table[1:] if line.strip()} for table in tables)
    for strategy in ("dense", "exact", "learned"):  # bf16 of f32: the same but for rounding
        source, ours = rows[strategy], packed[strategy]
        assert float(ours[1]) == pytest.approx(float(source[1]), rel=2e-3)
        assert float(ours[5][:-1]) == pytest.approx(float(source[5][:-1]), abs=1.0), "share of neurons computed"
    answers = [
        hybrid(capfd, "generate", out, "-p", "the cat", "--max-new-tokens", "6", "--sparsity", kind, *more)
        for kind, more in (("dense", []), ("exact", ["--mlock"]), ("learned", ["--threads", "1"]))
    ]
    assert all(code == 0 and "6 tokens" in err for code, _, err in answers)
    assert answers[0][1] == answers[1][1]
    assert hybrid(capfd, "inspect", out)[0] == 0
    assert "present and current" in hybrid(capfd, "prepare", out, *quick, *planned)[2]
    for command in (["profile", out, *quick[:4]], ["train", out]):
        code, _, err = hybrid(capfd, *command)
        assert code == 2 and "is packed; profile and train the model" in err


def test_another_placement_beside_packed_weights_is_refused(model, tmp_path, capfd):
    out = tmp_path / "packed"
    place(model)
    pack(model, out)
    place(model, seed=2)
    shutil.copy(model / "hybrid" / "placement.safetensors", out / "hybrid")
    code, _, err = hybrid(capfd, "generate", out, "-p", "x", "--sparsity", "exact", "--vram-budget", "0")
    assert code == 2 and "packed in another order" in err and err.count("\n") == 1


def test_mlock_is_for_packed_models(model, capfd):
    code, _, err = hybrid(capfd, "generate", model, "-p", "x", "--sparsity", "dense", "--mlock")
    assert code == 2 and "make one with `hybrid pack`" in err
