"""Packed models: what is read back is the source in another type and order; a killed or refused pack leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import CASES, make_model
from packed_cases import pack, place
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpu_kernels.blocks import dequantize, quantize
from hybrid.cli import main
from hybrid.errors import ArtifactError, InputError, ModelError
from hybrid.formats import new_folder
from hybrid.formats.config import FAMILIES
from hybrid.formats.packed import ALIGNMENT, PACKED_DTYPES, PACKED_FILE, PackedModel, packed_spec, parts
from hybrid.formats.tensors import layer_norms
from hybrid.model.loader import ModelFolder
from hybrid.model.reader import CheckpointReader
from hybrid.offline.pack import Packer
from placement.placement import Placement

pytest.importorskip("transformers")


def hybrid(capfd, *arguments):
    """Run the command in this process: exit code and stderr."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code or 0, capfd.readouterr().err


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder of a case, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_model(name, made[name], shard_size="60KB")
        return made[name]

    return get


@pytest.fixture
def model(sources, tmp_path):
    return shutil.copytree(sources("llama-relu"), tmp_path / "model")


def as_stored(weight, dtype):
    """What a weight becomes in `dtype`, as f32."""
    if dtype in ("int8", "int4"):
        return dequantize(quantize(weight.float().numpy(), dtype), weight.shape[1])
    return weight.to({"bf16": torch.bfloat16, "f16": torch.float16}[dtype]).float().numpy()


def source_tensors(folder):
    """Every tensor of a checkpoint by part name and layer, read by safetensors itself where it is not folded."""
    opened = ModelFolder.open(folder)
    spec, family = opened.spec, FAMILIES[opened.spec.family]
    turned = family.sine_turned or (spec.rope is not None and spec.rope.turned)
    if family.rows or family.norm_plus or turned or spec.logit_scale != 1:
        reader = CheckpointReader(spec, opened.checkpoint)  # which is held against transformers
        return spec, lambda part, kind="weight", layer=None: reader.tensor(part, layer, kind)
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored.update(load_file(path))
    return spec, lambda part, kind="weight", layer=None: stored[f"{family.tensors[part].format(layer)}.{kind}"]


def check_vector(found, name, expected):
    np.testing.assert_array_equal(found.vector(name, len(expected)), expected.float().numpy(), err_msg=name)


def check_matrix(found, name, weight, dtype):
    np.testing.assert_array_equal(found.matrix(name, *weight.shape).widen().numpy(), as_stored(weight, dtype), name)


def check_layer(found, spec, tensor, layer, order, dtype):
    def own(part, kind="weight"):
        return tensor(part, kind, layer)

    at, order = f"layers.{layer}.", torch.from_numpy(order).long()
    check_matrix(found, at + "qkv", torch.cat([own(part) for part in "qkv"]), dtype)
    check_matrix(found, at + "out", own("out"), dtype)
    check_matrix(found, at + "up", own("up")[order], dtype)
    check_matrix(found, at + "down", own("down").T[order], dtype)
    if spec.gated:
        check_matrix(found, at + "gate", own("gate")[order], dtype)
    for norm in layer_norms(spec):
        check_vector(found, f"{at}{norm}.weight", own(norm))
        if spec.norm == "layer":
            check_vector(found, f"{at}{norm}.bias", own(norm, "bias"))
    if spec.qk_norm:
        check_vector(found, at + "q_norm", own("q_norm"))
        check_vector(found, at + "k_norm", own("k_norm"))
        if spec.qk_norm == "head layer":
            check_vector(found, at + "k_norm.bias", own("k_norm", "bias"))
    if spec.qkv_bias:
        check_vector(found, at + "qkv.bias", torch.cat([own(part, "bias") for part in "qkv"]))
    if spec.out_bias:
        check_vector(found, at + "out.bias", own("out", "bias"))
    if spec.ffn_bias:
        check_vector(found, at + "up.bias", own("up", "bias")[order])
        check_vector(found, at + "down.bias", own("down", "bias"))
        if spec.gated:
            check_vector(found, at + "gate.bias", own("gate", "bias")[order])


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_family_reads_back(sources, tmp_path, name, dtype):
    folder = shutil.copytree(sources(name), tmp_path / "model")
    order = place(folder)
    pack(folder, tmp_path / "packed", dtype)
    found = PackedModel.open(tmp_path / "packed")
    spec, tensor = source_tensors(folder)
    assert (found.spec.dtype, found.spec.fingerprint) == (dtype, spec.fingerprint)
    np.testing.assert_array_equal(found.order, order)
    found.check_order(order)
    outer = "int8" if dtype == "int4" else dtype
    check_matrix(found, "embedding", tensor("embedding"), outer)
    check_vector(found, "final_norm.weight", tensor("final_norm"))
    if spec.rope is None:
        check_matrix(found, "positions", tensor("positions"), outer)
    if spec.tied:
        with pytest.raises(ModelError, match="no tensor 'head'"):
            found.matrix("head", spec.vocab_size, spec.d_model)
    else:
        check_matrix(found, "head", tensor("head"), outer)
    for layer in range(spec.n_layers):
        check_layer(found, spec, tensor, layer, order[layer], dtype)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_sixteen_bit_sources(tmp_path, source, dtype):
    make_model("qwen2", tmp_path / "model", source)
    pack(tmp_path / "model", tmp_path / "packed", dtype)
    found = PackedModel.open(tmp_path / "packed")
    spec, tensor = source_tensors(tmp_path / "model")
    for layer in range(spec.n_layers):
        check_layer(found, spec, tensor, layer, np.arange(spec.d_ff), dtype)


@pytest.mark.parametrize("name", ["llama-tied-mha-bias", "qwen3", "opt-gelu-untied"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_plan_counts_the_bytes_of_blocks(sources, name, dtype):
    spec = packed_spec(ModelFolder.open(sources(name)).spec, dtype)
    neurons = [part for part in parts(spec) if part.name.startswith("layers.0.") and part.shape[0] == spec.d_ff]
    assert sum(part.nbytes for part in neurons) == spec.layer_ffn_bytes
    assert sum(part.nbytes for part in parts(spec) if part.name != "order") == spec.model_bytes


def test_the_file_is_safetensors_with_aligned_tensors(model, tmp_path):
    pack(model, tmp_path / "packed", "int4")
    path = tmp_path / "packed" / PACKED_FILE
    spec = PackedModel.open(tmp_path / "packed").spec
    with safe_open(path, framework="numpy") as file:
        assert {part.name for part in parts(spec)} <= set(file.keys())
        assert file.get_tensor("layers.1.gate").shape == (spec.d_ff, 72)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if not name.startswith("_"):
            assert (8 + length + entry["data_offsets"][0]) % ALIGNMENT == 0


def test_the_folder_is_whole_by_itself(model, tmp_path):
    place(model)
    (model / "LICENSE.txt").write_text("keep me with the weights")
    pack(model, tmp_path / "packed")
    names = {str(path.relative_to(tmp_path / "packed")) for path in (tmp_path / "packed").rglob("*")}
    assert {"config.json", "tokenizer.json", "LICENSE.txt", "hybrid/placement.safetensors"} <= names
    assert not any("index" in name or name.startswith("model") for name in names)
    assert (tmp_path / "packed").stat().st_mode & 0o777 == 0o755


def test_what_is_current_is_not_written_again(model, tmp_path):
    out, first = tmp_path / "packed", place(model)
    assert pack(model, out).written
    written = (out / PACKED_FILE).stat().st_mtime_ns
    report = model / "hybrid" / "predictors.json"
    report.write_text("{}")
    assert not pack(model, out).written and (out / PACKED_FILE).stat().st_mtime_ns == written
    assert (out / "hybrid" / "predictors.json").read_text() == "{}"
    second = place(model, seed=2)
    assert pack(model, out).written
    found = PackedModel.open(out)
    found.check_order(second)
    with pytest.raises(ArtifactError, match="pack the model again"):
        found.check_order(first)
    assert pack(model, out, "bf16").written and PackedModel.open(out).spec.dtype == "bf16"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_without_a_placement_rows_keep_the_order_of_the_source(model, tmp_path):
    pack(model, tmp_path / "packed")
    found = PackedModel.open(tmp_path / "packed")
    found.check_order(Placement.all_cold(found.spec).order)
    assert not (tmp_path / "packed" / "hybrid").exists()
    with pytest.raises(ArtifactError, match="another order"):
        found.check_order(place(model))


KILLED = """
    import sys, time
    from contextlib import contextmanager
    from pathlib import Path
    from hybrid.formats.bundle import Bundle
    from hybrid.model.loader import ModelFolder
    from hybrid.offline.pack import Packer

    @contextmanager
    def stop_at(label, total, unit):
        def advance(count):
            if label == sys.argv[3]:
                print("here", flush=True)
                time.sleep(60)
        yield advance

    folder = ModelFolder.open(Path(sys.argv[1]))
    Packer(folder, Bundle.of(folder.path, folder.spec), "int4", stop_at).pack(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("phase", ["pack", "verify"])
def test_killed_and_run_again(model, tmp_path, phase):
    out = tmp_path / "packed"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), model, out, phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"here\n"
        with new_folder.new_folder(tmp_path / "packed-beside", 0):
            pass
        with new_folder.new_folder(out, 0) as mine:  # sweeps, but not what a living process writes
            assert len([path for path in tmp_path.iterdir() if path.suffix == ".tmp"]) == 2
            (mine / "x").touch()
        shutil.rmtree(out)
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".tmp"]) == 1
    assert pack(model, out, "int4").written and PackedModel.open(out).spec.dtype == "int4"
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_an_error_leaves_what_was_there(model, tmp_path, monkeypatch):
    out = tmp_path / "packed"
    pack(model, out)
    before = (out / PACKED_FILE).read_bytes()
    monkeypatch.setattr(Packer, "verify", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(model, out, "bf16")
    assert (out / PACKED_FILE).read_bytes() == before
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def large_model(folder, layers=8, d=1024, f=8192):
    """A bf16 Llama whose weights are quick to make: 2 x 3 x d x f bytes a layer."""
    folder.mkdir()
    config = {"model_type": "llama", "hidden_act": "relu", "hidden_size": d, "intermediate_size": f}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 500}
    config |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    noise = torch.randn(f, d).to(torch.bfloat16)
    tensors = {"model.embed_tokens": noise[:500].clone(), "model.norm": torch.ones(d)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes = {"q": d, "k": d // 4, "v": d // 4, "o": d}
        tensors |= {f"{at}self_attn.{part}_proj": noise[:rows].clone() for part, rows in shapes.items()}
        tensors |= {f"{at}mlp.gate_proj": noise.clone(), f"{at}mlp.up_proj": noise.clone()}
        tensors |= {f"{at}mlp.down_proj": noise.T.contiguous()}
        tensors |= {f"{at}input_layernorm": torch.ones(d), f"{at}post_attention_layernorm": torch.ones(d)}
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


MEASURED = """
    import os
    import sys
    from pathlib import Path

    # Each coder holds a few blocks, and there are as many coders as CPUs, up to eight.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    import hybrid.commands
    from hybrid.cli import main

    def peak():  # of this program; rusage would count the parent's memory before it
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    before = peak()
    try:
        main(["pack", sys.argv[1], "--dtype", sys.argv[3], "-o", sys.argv[2]])
    except SystemExit as left:
        assert left.code == 0
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    large_model(tmp_path / "model", layers=4)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), tmp_path / "model", tmp_path / "packed", "bf16"]
    grown = int(subprocess.run(command, check=True, capture_output=True).stdout)
    largest = 8192 * 1024 * 2
    assert grown < largest + 150 * 2**20 < size


def test_mistakes_are_one_line(model, tmp_path, capfd, monkeypatch):
    def refused(*arguments):
        code, err = hybrid(capfd, "pack", *arguments)
        assert code == 2 and err.count("\n") == 1 and err.startswith("hybrid: ")
        return err

    assert "does not exist" in refused(tmp_path / "nowhere", "--dtype", "int8")
    assert "'int3'" in refused(model, "--dtype", "int3")
    assert "--dtype" in refused(model)
    assert "exists and is not a packed copy" in refused(model, "--dtype", "int8", "-o", model)
    (tmp_path / "file").write_text("x")
    assert "exists and is not a packed copy" in refused(model, "--dtype", "int8", "-o", tmp_path / "file")
    assert "cannot write" in refused(model, "--dtype", "int8", "-o", tmp_path / "file" / "inside")
    code, err = hybrid(capfd, "pack", model, "--dtype", "int8")
    assert code == 0 and "wrote" in err and PackedModel.is_packed(model / "hybrid" / "packed-int8")
    code, err = hybrid(capfd, "pack", model, "--dtype", "int8")
    assert code == 0 and "present and current" in err
    assert "is packed already" in refused(model / "hybrid" / "packed-int8", "--dtype", "int4")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "1 B are free" in refused(model, "--dtype", "bf16")


def test_a_packed_folder_of_another_model_is_not_replaced(model, sources, tmp_path):
    pack(model, tmp_path / "packed")
    with pytest.raises(InputError, match="not a packed copy of this model"):
        pack(sources("qwen2"), tmp_path / "packed")


@pytest.mark.parametrize(("value", "dtype"), [(7e4, "f16"), (7e4, "int8"), (float("nan"), "bf16"), (np.inf, "int4")])
def test_weights_that_a_type_cannot_hold_are_refused(tmp_path, value, dtype):
    folder = tmp_path / "model"
    make_model("llama-relu", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.down"):
        pack(folder, tmp_path / "packed", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_interrupted_by_a_signal(tmp_path):
    """Ctrl-C in the middle: one line, exit code 130, and nothing left."""
    large_model(tmp_path / "model", layers=2)
    command = [sys.executable, "-m", "hybrid", "pack", tmp_path / "model", "--dtype", "int4", "-o", tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*/packed.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGINT)
        err = child.stderr.read()
    assert child.returncode == 130 and err.endswith("interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
