"""The run-time form of GGUF models of Q8_0 and Q4_0: the same numbers as our packed models of the same codes."""

import shutil

import numpy as np
import pytest
import torch
from gguf_cases import make, unpacked, write
from packed_cases import pack, place

from cpu_kernels.blocks import dequantize
from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.packed import PackedModel, parts
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.gguf_run import open_run_form
from hybrid.model.loader import ModelFolder
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.engine import Engine

pytest.importorskip("gguf")
TYPES = {"q8_0": "int8", "q4_0": "int4"}
PROMPTS = ["Once upon a time there was a little dog", "The king said to his daughter,", "There are 12 apples in"]


def opened(path, tmp_path, order=None):
    folder = ModelFolder.open(path)
    return open_run_form(folder.spec, folder.checkpoint, order, tmp_path / "run")


def numbers(packed, part):
    stored = packed.stored(part.name)
    return dequantize(stored, part.shape[1]) if part.dtype in TYPES.values() else stored


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", [None, 3])
def test_it_is_the_packed_model_of_the_same_codes(tmp_path, kind, seed):
    path = make(tmp_path, kind, embedding="q8_0")
    folder = ModelFolder.open(unpacked(path, tmp_path / "numbers"))
    spec, order = folder.spec, None
    if seed is not None:
        (tmp_path / "numbers" / "hybrid").mkdir()
        order = place(tmp_path / "numbers", seed)
    pack(tmp_path / "numbers", tmp_path / "packed", TYPES[kind])
    expected, found = PackedModel.open(tmp_path / "packed"), opened(path, tmp_path, order)
    assert found.spec.dtype == TYPES[kind] and spec.d_ff == found.spec.d_ff
    for part in parts(found.spec):
        np.testing.assert_array_equal(numbers(found, part), numbers(expected, part), err_msg=part.name)


@pytest.mark.parametrize("kind", TYPES)
def test_codes_are_the_files_own(tmp_path, kind):
    """Down is rounded once more: within half a step of a block's largest weight, other parts are not touched."""
    path = make(tmp_path, kind)
    folder, run = ModelFolder.open(path), opened(path, tmp_path)
    up = folder.checkpoint.tensor("model.layers.1.mlp.up_proj.weight", (160, 96)).numpy()
    down = folder.checkpoint.tensor("model.layers.1.mlp.down_proj.weight", (96, 160)).numpy().T
    head = folder.checkpoint.tensor("lm_head.weight", (131, 96)).numpy()
    found = {part.name: part for part in parts(run.spec)}
    np.testing.assert_array_equal(numbers(run, found["layers.1.up"]), up)
    np.testing.assert_array_equal(numbers(run, found["head"]), head)
    error = np.abs(numbers(run, found["layers.1.down"]) - down)
    assert 0 < error.max() <= np.abs(down).max() / {"q8_0": 127, "q4_0": 7}[kind]


def test_it_is_written_once_and_anew_for_another_order(tmp_path):
    path = make(tmp_path, "q8_0")
    file, placed = tmp_path / "run" / "run-int8.safetensors", tmp_path / "run" / "run-int8-placed.safetensors"
    opened(path, tmp_path)
    written = file.stat().st_mtime_ns
    opened(path, tmp_path)
    assert file.stat().st_mtime_ns == written and not placed.exists()
    for seed in (1, 2):
        order = np.stack([np.random.default_rng(seed).permutation(160) for _ in range(3)]).astype(np.int32)
        np.testing.assert_array_equal(opened(path, tmp_path, order).order, order)
    assert file.stat().st_mtime_ns == written and placed.exists()
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    assert opened(path, tmp_path).stored("layers.0.up").shape == (160, 136)


def test_a_disk_without_room_is_one_line(tmp_path, monkeypatch):
    path = make(tmp_path, "q8_0")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(InputError, match=r"run-int8.safetensors, .* needs .*, 1000 B are free there; name another"):
        opened(path, tmp_path)


def tokens(model, prompts=PROMPTS):
    settings = SamplingSettings(temperature=0, max_new_tokens=48)
    with Engine.load(model, EngineConfig(sparsity="exact", threads=2)) as engine:
        found = []
        for prompt in prompts:
            engine.reset()
            ids = engine.codec.encode(prompt, special=False)
            found.append((ids, [step.token for step in engine.generate(ids, settings)]))
        return found


def test_the_shipped_model_as_f16_gives_its_own_tokens(tmp_path):
    """f16 holds all but one in 700 of its bf16 weights, and those to within 3e-8."""
    path = write(EMBEDDED_MODEL, tmp_path / "m.gguf", "f16")
    assert tokens(path) == tokens(EMBEDDED_MODEL)


@pytest.mark.parametrize("kind", TYPES)
def test_the_shipped_model_in_blocks_gives_the_tokens_of_the_packed_one(tmp_path, kind):
    path = write(EMBEDDED_MODEL, tmp_path / "m.gguf", kind, embedding="q8_0")
    pack(unpacked(path, tmp_path / "numbers"), tmp_path / "packed", TYPES[kind])
    pack(path, tmp_path / "taken", TYPES[kind])
    found = tokens(path)
    assert found == tokens(tmp_path / "packed") == tokens(tmp_path / "taken")
    assert (tmp_path / "m.hybrid" / f"run-{TYPES[kind]}.safetensors").is_file()


def test_prefill_over_blocks_of_floats_is_that_of_the_folder(tmp_path):
    path, ids = make(tmp_path, "f32"), torch.tensor([5, 99, 7, 130, 0, 64, 31, 2])
    found = []
    for model in (path, tmp_path / "model"):
        folder = ModelFolder.open(model)
        runtime = FFNRuntime("dense", WorkerPool(1), folder.spec.d_model, folder.spec.d_ff)
        built = folder.build(runtime, None, None)
        found.append(built.logits(built(ids)))
    assert torch.equal(*found)
