"""A GGUF file under Hugging Face's view: the same tensors and the same spec as the folder it was written from."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_cases import WIDE, make, write
from model_cases import LLAMA3_ROPE, make_model

from hybrid.errors import ModelError
from hybrid.formats.config import parse_config
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.model.loader import ModelFolder

gguf = pytest.importorskip("gguf")
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 32, "num_key_value_heads": 6},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_act": "silu"},
        {"rope_parameters": LINEAR},
        {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 128},
    ],
)
def test_a_file_of_floats_is_the_folder_it_was_written_from(tmp_path, changes):
    path = make(tmp_path, "f32", **changes)
    folder, file = ModelFolder.open(tmp_path / "model"), ModelFolder.open(path)
    near = replace(file.spec, norm_eps=folder.spec.norm_eps, fingerprint=folder.spec.fingerprint)  # GGUF's eps is f32
    assert near == folder.spec and file.spec.norm_eps == pytest.approx(folder.spec.norm_eps, rel=1e-6)
    assert file.notices == ()
    assert file.checkpoint.infos.keys() == folder.checkpoint.infos.keys()
    for name, info in folder.checkpoint.infos.items():
        torch.testing.assert_close(
            file.checkpoint.tensor(name, info.shape), folder.checkpoint.tensor(name, info.shape), rtol=0, atol=0
        )
        assert file.checkpoint.largest(name, info.shape) == folder.checkpoint.largest(name, info.shape)
    file.check_finite()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_are_mapped_as_they_are(tmp_path, kind):
    file = ModelFolder.open(make(tmp_path, kind))
    name, shape = "model.layers.1.mlp.up_proj.weight", (160, 96)
    exact = ModelFolder.open(tmp_path / "model").checkpoint.tensor(name, shape)
    found = file.checkpoint.tensor(name, shape)
    assert file.spec.dtype == kind
    assert torch.equal(found, exact.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]))
    view = file.checkpoint.mapped(name, shape)
    while view.base is not None and not isinstance(view, np.memmap):
        view = view.base
    assert isinstance(view, np.memmap)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"), [("q8_0", "int8", "F32"), ("q4_0", "int4", "F32"), ("q5_1", "f16", "F16")]
)
def test_blocks_are_read_by_rows_in_the_familys_order(tmp_path, kind, dtype, stored):
    file = ModelFolder.open(make(tmp_path, kind))
    checkpoint, folder = file.checkpoint, ModelFolder.open(tmp_path / "model").checkpoint
    assert file.spec.dtype == dtype and len(file.notices) == 1
    for name, shape in (("model.layers.2.self_attn.k_proj.weight", (32, 96)), ("model.embed_tokens.weight", (131, 96))):
        exact, rows = folder.tensor(name, shape), np.array([17, 3, 30])
        kept = gguf.quants.dequantize(
            gguf.quants.quantize(exact.numpy(), gguf.GGMLQuantizationType[kind.upper()]),
            gguf.GGMLQuantizationType[kind.upper()],
        )
        expected = torch.from_numpy(kept).to({"F32": torch.float32, "F16": torch.float16}[stored])
        assert checkpoint.infos[name].dtype == stored
        assert torch.equal(checkpoint.tensor(name, shape), expected)
        assert torch.equal(checkpoint.rows(name, shape, rows), expected[rows])


def test_a_mixture_runs_as_f16_and_says_so(tmp_path):
    make_model("llama-relu", tmp_path / "model", **WIDE)
    file = ModelFolder.open(write(tmp_path / "model", tmp_path / "m.gguf", "q4_0", embedding="q8_0"))
    assert file.spec.dtype == "int4" and file.spec.embedding_dtype == "int8"
    path = tmp_path / "m.gguf"
    at = GGUFCheckpoint(path).file.tensors["blk.1.attn_v.weight"]
    raw = path.read_bytes()  # another type of as many bytes
    place = raw.index(b"blk.1.attn_v.weight") + len("blk.1.attn_v.weight") + 4 + 16
    assert raw[place : place + 4] == struct.pack("<I", 2) and at.type == "Q4_0"
    path.write_bytes(raw[:place] + struct.pack("<I", 20) + raw[place + 4 :])
    file = ModelFolder.open(path)
    assert file.spec.dtype == "f16" and file.spec.embedding_dtype is None
    assert file.notices[0].startswith("Q4_0, Q8_0, IQ4_NL run as f16, which takes ")


def test_what_another_file_of_metadata_says_is_refused(tmp_path):
    make_model("llama-relu", tmp_path / "model", **WIDE)

    def opened(**metadata):
        return ModelFolder.open(write(tmp_path / "model", tmp_path / "m.gguf", "f16", **metadata))

    for metadata, problem in (
        ({"general__architecture": "mamba"}, "unknown architecture 'mamba'; known are llama,"),
        ({"llama__attention__value_length": 8}, "'llama.attention.value_length' is 8, expected the length of keys, 16"),
        ({"llama__block_count": 2}, r"has tensor 'blk\.2\..*', which has no place in a llama model of 2 layers"),
        (
            {"llama__block_count": 4},
            r"has no tensor 'model\.layers\.3\..*; the checkpoint is incomplete for its metadata",
        ),
        ({"llama__embedding_length": 64}, r"has shape \[131, 96\], metadata asks for \[131, 64\]"),
        ({"llama__embedding_length": None}, "has no field 'hidden_size'"),
        ({"llama__block_count": 2**31}, "'llama.block_count' is 2147483648, expected a whole number from 1 to 30"),
        ({"llama__attention__head_count": "x"}, "'llama.attention.head_count' is 'x', expected a whole number"),
        ({"llama__rope__freq_base": -1.0}, "'llama.rope.freq_base' is -1.0, expected a number above 0"),
        ({"llama__rope__scaling__type": "banana"}, "unknown RoPE type 'banana'"),
        ({"hybrid__hidden_act": "banana"}, "unknown activation 'banana'"),
    ):
        with pytest.raises(ModelError, match=problem):
            opened(**metadata)


def test_factors_of_rope_that_are_no_llama_3s_are_refused(tmp_path):
    path = make(tmp_path, "f16", rope_parameters=LLAMA3_ROPE, max_position_embeddings=128)
    checkpoint = GGUFCheckpoint(path)
    assert parse_config(checkpoint.config).rope.original_context == 16
    factors = checkpoint.file.tensors["rope_freqs.weight"]
    with path.open("r+b") as file:
        file.seek(factors.start)
        file.write(struct.pack("<f", 1.5))
    with pytest.raises(ModelError, match="not those of Llama 3's scaling"):
        GGUFCheckpoint(path)


def test_a_damaged_scale_is_found(tmp_path):
    path = make(tmp_path, "q8_0")
    place = GGUFCheckpoint(path).file.tensors["blk.1.ffn_up.weight"].start
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff\x7f")
    folder = ModelFolder.open(path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight' has a scale that is no number"):
        folder.check_finite()
