"""The command line as a user meets it: the whole loop on a small model; every mistake is one line and exit code 2."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from model_cases import make_model
from safetensors.torch import load_file, save_file

from hybrid.bench.hardware import hardware_report
from hybrid.cli import main
from hybrid.options import repeat_corpus
from profiler.common.hardware import HardwareProfile
from profiler.machine import cpu, timing

pytest.importorskip("transformers")
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}<a>"
QUICK = ["--tokens", "2000", "--window", "32"]
PLANNED = ["--hardware", "default", "--vram-budget", "4MiB"]


def hybrid(capfd, *arguments):
    """Run the command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return left.value.code or 0, out, err


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    make_model("llama-relu", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "run", "far", "away", "over", "hills"]
    lines = [" ".join(words[(n * k) % len(words)] for k in range(1, 25)) for n in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def prepared(original, corpus, tmp_path_factory):
    folder = shutil.copytree(original, tmp_path_factory.mktemp("prepared") / "model")
    command = [sys.executable, "-m", "hybrid", "prepare", folder, "--corpus", corpus, *QUICK, *PLANNED]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def without_gpu(monkeypatch):
    """No GPU, and a measurement of the CPU that is as quick as it is rough."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("WIDTH", 128), ("_NEURONS", 256), ("PRODUCT_TOKENS", 16), ("_GEMM_ROWS", 8)):
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(timing, "_SECONDS", 0.0)


@pytest.fixture
def model(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "model")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.smoke
def test_the_whole_loop(original, corpus, tmp_path, capfd):
    """Every command once, in the order of a new user."""
    folder = shutil.copytree(original, tmp_path / "model")
    prepare = ["prepare", folder, "--corpus", corpus, *QUICK, *PLANNED]
    code, out, err = hybrid(capfd, *prepare)
    assert code == 0 and out == "" and "on: 24 GB GPU" in err
    code, _, err = hybrid(capfd, *prepare)
    assert code == 0 and err.count("present and current") == 3
    code, out, err = hybrid(capfd, "generate", folder, "-p", "the cat", "--max-new-tokens", "5", "--temperature", "0")
    assert code == 0 and out.endswith("\n") and "5 tokens" in err and "tok/s" not in out
    evaluate = ["eval", folder, "--corpus", corpus, "--tokens", "128", "--window", "32", "--answer-tokens", "9"]
    code, out, _ = hybrid(capfd, *evaluate, "--curve", "--answers", "2")
    assert code == 0 and all(name in out for name in ("dense", "exact", "learned", "KL", "missed mass"))
    table = out.partition("distinct 4-grams\n")[2].splitlines()
    assert [line.split()[:5] for line in table[:2]] == [[name, "9", "2", "of", "2"] for name in ("dense", "exact")]
    code, _, err = hybrid(capfd, *evaluate, "--answers", "5")
    assert code == 2 and "--answers 5 wants as many documents of 32 tokens, 2 begin in the text" in err
    code, out, _ = hybrid(capfd, "inspect", folder)
    assert code == 0 and all(name in out for name in ("fingerprint", "recall", "VRAM budget", "text.jsonl"))
    code, out, _ = hybrid(capfd, "doctor")
    assert code == 0 and all(name in out for name in ("CPU", "GPU", "torch", "embedded model", "; CPU, "))


def test_each_step_by_hand(original, corpus, tmp_path, capfd):
    folder = shutil.copytree(original, tmp_path / "model")
    odd = tmp_path / "odd.jsonl"
    odd.write_text("{oops")
    recorded = ["profile", folder, "--corpus", corpus, odd, "--skip-bad", "--tokens", "2000", "--window", "32"]
    code, out, err = hybrid(capfd, *recorded, "--own-text", "320")
    assert code == 0 and "hottest 20% cover" in out and "2,304 tokens" in out and "own text: 280 tokens" in err
    assert "of 60 documents" in err and f"left out: 1 document, the first: {odd}:1 is not JSON" in err
    code, out, _ = hybrid(capfd, "train", folder, "--target", "50%")
    assert code == 0 and "recall" in out
    report = json.loads((folder / "hybrid" / "predictors.json").read_text())
    assert len(report["layers"]) == 3 and 0 <= report["overall"]["recall"] <= 1
    code, out, _ = hybrid(capfd, "place", folder, *PLANNED, "--solver", "greedy", "--dry-run")
    assert code == 0 and "budget" in out and not (folder / "hybrid" / "placement.safetensors").exists()
    code, out, err = hybrid(capfd, "place", folder, "--hardware", "default", "--vram-budget", "0")
    assert code == 0 and "gap" in out and "tokens/s" in out and "wrote" in err
    assert "seed 0; 320 tokens of the model's own text" in hybrid(capfd, "inspect", folder)[1]


def test_hardware_is_measured_shown_and_planned_for(model, tmp_path, monkeypatch, capfd):
    without_gpu(monkeypatch)
    path = tmp_path / "new" / "machine.json"
    code, out, err = hybrid(capfd, "hardware", "-o", path)
    assert code == 0 and "no GPU" not in err and "GPU: none usable" in out and "sparse FFN, GB/s" in out
    assert "host memory, 1 thread" in err and str(path) in err.splitlines()[-1]
    code, out, _ = hybrid(capfd, "place", model, "--hardware", path, "--vram-budget", "0", "--dry-run")
    assert code == 0 and HardwareProfile.load(path).name in out


def test_without_a_gpu_the_plan_is_for_this_cpu(model, monkeypatch, capfd):
    """Measured once, beside the other artefacts; a budget needs a GPU, here or in a hardware profile."""
    without_gpu(monkeypatch)
    code, out, err = hybrid(capfd, "place", model)
    assert code == 0 and "no GPU: all neurons are computed by the CPU; predicted " in out and "24 GB" not in out
    assert "host memory" in err and not HardwareProfile.load(model / "hybrid" / "hardware.json").has_gpu
    code, _, err = hybrid(capfd, "place", model)
    assert code == 0 and "host memory" not in err
    code, out, err = hybrid(capfd, "generate", model, "-p", "the cat", "--max-new-tokens", "3")
    assert code == 0 and "hot" not in err
    code, _, err = hybrid(capfd, "place", model, "--vram-budget", "1GiB")
    assert code == 2 and "there is no GPU here" in err and "--hardware default, a 24 GB GPU" in err


def test_a_hardware_report_shows_the_gpu():
    report = hardware_report(replace(HardwareProfile.load(), gpu_kernels={"gemv": ((33_554_432.0, 1.2e-5),)}))
    assert "0.90 TB/s" in report and "24.0 GB/s to the GPU" in report
    assert any(line.split() == ["gemv", "32.0", "MiB", "12.0", "2.80"] for line in report.splitlines())


def test_piped_chat(model):
    command = [sys.executable, "-m", "hybrid", "chat", model, "--max-new-tokens", "6"]
    done = subprocess.run(command, input="hello\n\nmore\n/placement\n", capture_output=True, text=True, check=True)
    assert done.stderr.count("tok/s") == 2 and "No GPU is used" in done.stdout


def test_output_may_be_cut_off(model):
    command = f"{sys.executable} -m hybrid generate {model} -p abc --max-new-tokens 40 | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(path, name):
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def poison(m, name, value):
    """One weight of a model is `value`, and there is a corpus."""
    weights = load_file(m / "model.safetensors")
    weights[name].view(-1)[7] = value
    save_file(weights, m / "model.safetensors")
    (m / "c.jsonl").write_text("".join(json.dumps({"text": f"{n} words and others " * 9}) + "\n" for n in range(60)))


def overlap(path):
    """Two tensors of one shape have the same bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.layers.0.mlp.up_proj.weight"] = header["model.layers.0.mlp.gate_proj.weight"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


FFN = "model.layers.1.mlp."
PREPARE = ["prepare", "{m}", "--hardware", "default", "--corpus", "{m}/c.jsonl", *QUICK]
MISTAKES = {
    "missing folder": (lambda m: None, ["chat", "{m}/nowhere"], "does not exist"),
    "truncated weights": (lambda m: truncate(m / "model.safetensors"), ["chat", "{m}"], "truncated"),
    "NaN in weights": (
        lambda m: poison(m, f"{FFN}up_proj.weight", math.nan),
        PREPARE,
        f"'{FFN}up_proj.weight' has NaN",
    ),
    "too large a weight": (
        lambda m: poison(m, "model.layers.1.post_attention_layernorm.weight", 3e38),
        PREPARE,
        "computes infinite numbers or NaN",
    ),
    "inspect overlapping tensors": (lambda m: overlap(m / "model.safetensors"), ["inspect", "{m}"], "overlaps another"),
    "pack overlapping tensors": (
        lambda m: overlap(m / "model.safetensors"),
        ["pack", "{m}", "--dtype", "int8"],
        "overlaps another",
    ),
    "inspect other shapes": (lambda m: edit(m / "config.json", vocab_size=10**9), ["inspect", "{m}"], "has shape [131"),
    "absurd layers": (lambda m: edit(m / "config.json", num_hidden_layers=10**9), ["inspect", "{m}"], "is 1000000000"),
    "absurd context": (
        lambda m: edit(m / "config.json", max_position_embeddings=2**31 - 1),
        ["generate", "{m}", "-p", "a", "--sparsity", "dense", "--bundle", "{m}/none"],
        "lower the context",
    ),
    "no needed field": (lambda m: drop(m / "config.json", "hidden_size"), ["inspect", "{m}"], "no field 'hidden_size'"),
    "unknown architecture": (lambda m: edit(m / "config.json", model_type="x"), ["chat", "{m}"], "architecture 'x'"),
    "unknown activation": (lambda m: edit(m / "config.json", hidden_act="x"), ["chat", "{m}"], "activation 'x'"),
    "other weights": (
        lambda m: edit(m / "config.json", rms_norm_eps=1e-3),
        ["generate", "{m}", "-p", "a"],
        "was made for model",
    ),
    "no corpus": (lambda m: None, ["profile", "{m}"], "no corpus given"),
    "missing corpus": (lambda m: None, ["profile", "{m}", "--corpus", "{m}/no.txt"], "does not exist"),
    "empty corpus": (lambda m: (m / "c.txt").touch(), ["profile", "{m}", "--corpus", "{m}/c.txt"], "empty corpus"),
    "binary corpus": (
        lambda m: None,
        ["profile", "{m}", "--corpus", "{m}/model.safetensors"],
        "is binary, expected UTF-8",
    ),
    "odd document": (
        lambda m: (m / "c.jsonl").write_text('{"text": "a"}\n{oops'),
        ["profile", "{m}", "--corpus", "{m}/c.jsonl"],
        "c.jsonl:2 is not JSON",
    ),
    "short corpus": (
        lambda m: (m / "c.txt").write_text("few words"),
        ["prepare", "{m}", "--corpus", "{m}/c.txt", "--window", "32"],
        "corpus too short",
    ),
    "negative budget": (lambda m: None, ["place", "{m}", "--vram-budget", "-1"], "-1"),
    "negative size": (lambda m: None, ["place", "{m}", "--vram-budget", "-1GiB"], "negative"),
    "absurd budget": (lambda m: None, ["place", "{m}", "--vram-budget", "9000TiB"], "beyond 1 PiB"),
    "no size": (lambda m: None, ["place", "{m}", "--vram-budget", "lots"], "is not a size"),
    "long context": (lambda m: None, ["chat", "{m}", "--context", "65"], "takes 1 to 64 tokens (--context)"),
    "long context to place": (lambda m: None, ["place", "{m}", "--context", "65"], "1 to 64"),
    "long prompt": (lambda m: None, ["generate", "{m}", "-p", "a" * 70], "leaves no room"),
    "bad target": (lambda m: None, ["train", "{m}", "--target", "much"], "is not a perplexity increase"),
    "bad setting": (lambda m: None, ["chat", "{m}", "--top-p", "2"], "top_p is 2.0"),
    "bad threads": (lambda m: None, ["chat", "{m}", "--threads", "0"], "'--threads': 0 is not in the range"),
    "too many threads": (lambda m: None, ["chat", "{m}", "--threads", "5000"], "threads is 5000, expected"),
    "no list": (lambda m: None, ["bench", "{m}", "--sparsity", "dense,dense"], "is no list of different ones of"),
    "half a peer": (lambda m: None, ["bench", "{m}", "--peer", "llama.cpp"], "--peer and --peer-model go together"),
    "corrupt predictors": (
        lambda m: truncate(m / "hybrid" / "predictors.safetensors"),
        ["chat", "{m}", "--sparsity", "learned"],
        "rebuild it with: hybrid prepare",
    ),
    "missing placement": (
        lambda m: (m / "hybrid" / "placement.safetensors").unlink(),
        ["chat", "{m}", "--sparsity", "learned"],
        "hybrid prepare",
    ),
    "bad hardware": (
        lambda m: (m / "h.json").write_text("{}"),
        ["place", "{m}", "--hardware", "{m}/h.json"],
        "no format version",
    ),
    "hardware to a folder": (lambda m: None, ["hardware", "-o", "{m}"], "is a directory"),
    "hardware below a file": (
        lambda m: None,
        ["hardware", "-o", "{m}/config.json/x"],
        "config.json; choose another folder",
    ),
    "hardware to nowhere": (lambda m: None, ["hardware"], "Missing option '-o'"),
    "no prompt": (lambda m: None, ["generate", "{m}"], "--prompt"),
    "prompt is binary": (lambda m: None, ["generate", "{m}", "--prompt-file", "{m}/model.safetensors"], "UTF-8"),
    "unknown option": (lambda m: None, ["chat", "{m}", "--nope"], "No such option"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_lose_nothing(case, model, capfd):
    damage, arguments, message = MISTAKES[case]
    damage(model)
    before = contents(model)
    code, out, err = hybrid(capfd, *(argument.format(m=model) for argument in arguments))
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert message in last and "Traceback" not in err and out == ""
    assert contents(model) == before


def test_inspect_says_what_is_ignored(model, capfd):
    edit(model / "config.json", sliding_window=5)
    code, out, _ = hybrid(capfd, "inspect", model)
    assert code == 0 and "note: config.json's 'sliding_window' (5) has no part in a llama model and is ignored" in out
    assert "in f32\n" in out


def test_a_newer_format_is_refused(model, capfd):
    path = model / "hybrid" / "predictors.safetensors"
    data = path.read_bytes()
    assert data.count(b'\\"format_version\\": 2') == 1
    path.write_bytes(data.replace(b'\\"format_version\\": 2', b'\\"format_version\\": 7'))
    before = contents(model)
    code, _, err = hybrid(capfd, "chat", model, "--sparsity", "learned")
    assert code == 2 and "format version 7, this build reads up to 2" in err and contents(model) == before


def test_artefacts_of_another_model(model, original, tmp_path, capfd):
    other = tmp_path / "other"
    make_model("llama-mqa-head-dim", other)
    shutil.copytree(model / "hybrid", other / "hybrid")
    for command in (["train", other], ["place", other, *PLANNED], ["generate", other, "-p", "a"]):
        before = contents(other)
        code, _, err = hybrid(capfd, *command)
        assert code == 2 and "was made for model" in err and contents(other) == before


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small tmpfs")
def test_a_full_disk_leaves_what_was_there(model, corpus, tmp_path, capfd):
    bundle = tmp_path / "small"
    bundle.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", bundle], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        (bundle / "profile.safetensors").write_bytes(b"what was there")
        before = contents(bundle)
        command = ["profile", model, "--corpus", corpus, "--bundle", bundle, "--tokens", "2000", "--window", "32"]
        code, _, err = hybrid(capfd, *command)
        assert code == 2 and "No space left on device" in err.strip().splitlines()[-1]
        assert contents(bundle) == before
    finally:
        subprocess.run(["umount", bundle], check=True)


def test_prepare_survives_being_killed_at_any_moment(original, corpus, tmp_path):
    folder = shutil.copytree(original, tmp_path / "model")
    command = [sys.executable, "-m", "hybrid", "prepare", folder, "--corpus", corpus, *QUICK, *PLANNED]
    for seconds in (0.5, 2.0, 2.5, 3.0, 3.5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    generate = [sys.executable, "-m", "hybrid", "generate", folder, "-p", "the", "--max-new-tokens", "3"]
    subprocess.run(generate, check=True, capture_output=True)


def test_ctrl_c_is_clean(original, corpus, tmp_path):
    folder = shutil.copytree(original, tmp_path / "model")
    command = [sys.executable, "-m", "hybrid", "profile", folder, "--corpus", corpus, "--window", "2"]
    command += ["--own-text", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "%" not in process.stderr.readline():  # the first quarter is done
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted: ") and "windows are kept" in err
    assert (folder / "hybrid" / "profile.partial.safetensors").is_file()


def test_several_files_after_one_corpus_option():
    assert repeat_corpus(["profile", "m", "--corpus", "a", "b", "--tokens", "5"]) == [
        *("profile", "m", "--corpus", "a", "--corpus", "b", "--tokens", "5")
    ]
    assert repeat_corpus(["eval", "--corpus", "a", "--corpus", "b"]) == ["eval", "--corpus", "a", "--corpus", "b"]
    assert repeat_corpus(["eval", "--corpus"]) == ["eval", "--corpus"]
