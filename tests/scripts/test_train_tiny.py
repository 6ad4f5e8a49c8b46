"""The training script: a run of three steps gives a whole Hugging Face folder, and bad input gives one clear line."""

import importlib.util
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from profiler.common.errors import CorpusError, InputError, ModelError

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tiny.py"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; `scripts` is a folder of programs, not a package."""
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three token files, one of them compressed, in which each id is followed by the next one."""
    folder = tmp_path / "data"
    folder.mkdir()
    ids = (np.arange(4000) % 50 + 100).astype(np.uint16).tobytes()
    (folder / "stories.bin").write_bytes(ids)
    (folder / "chat.bin").write_bytes(ids)
    (folder / "books.bin.xz").write_bytes(lzma.compress(ids))
    return folder


@pytest.fixture
def run(script: ModuleType, data: Path, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Train a small model and return its folder; keywords go to `TrainConfig`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these matrices are too small to share out

    def train(**settings) -> Path:
        config = script.TrainConfig(**({"steps": 3, "batch": 4, "seq": 12} | settings))
        out = tmp_path / "out"
        script.make_model(data, script.EMBEDDED_MODEL, out, config, "cpu", script.ModelConfig(**SHAPE))
        return out

    yield train
    torch.set_num_threads(threads)


def test_folder_is_complete_and_reads_as_llama(script, run):
    transformers = pytest.importorskip("transformers")
    out = run()
    expected = {"config.json", "model.safetensors", "train_log.json", *script.TOKENIZER_FILES}
    assert {path.name for path in out.iterdir()} == expected
    reference = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    written = load_file(out / "model.safetensors")
    wanted = {name: value.shape for name, value in reference.state_dict().items() if name != "lm_head.weight"}
    assert {name: value.shape for name, value in written.items()} == wanted
    model = script.TinyLlama(script.ModelConfig(**SHAPE))
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in written.items()})
    ids = torch.tensor([[5, 17, 4095, 8191, 0, 1]])
    with torch.no_grad():
        # The script rounds cos and sin to bf16 as autocast does, hence the tolerance.
        torch.testing.assert_close(model(ids)[0], reference(ids).logits, rtol=1e-2, atol=1e-3)
    assert transformers.AutoTokenizer.from_pretrained(out)("Hello").input_ids


def test_config_and_log_say_what_was_trained(script, run):
    out = run(seed=3)
    config = json.loads((out / "config.json").read_text())
    shipped = json.loads((script.EMBEDDED_MODEL / "config.json").read_text())
    for name in ("hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == shipped[name], name
    log = json.loads((out / "train_log.json").read_text())
    assert (log["args"]["seed"], log["args"]["steps"], log["config"]["hidden_size"]) == (3, 3, 32)
    assert [row["step"] for row in log["log"]] == [0] and set(log["final"]) == {"stories", "chat", "books"}


def test_training_lowers_the_loss(script, run):
    # 50 of 8192 ids occur, in a fixed order: knowing which ones gives log(50), knowing the order less than that.
    log = json.loads((run(steps=200) / "train_log.json").read_text())
    assert log["log"][0]["ce"] == pytest.approx(math.log(8192), abs=0.1)
    assert log["final"]["chat"][0] < math.log(50)


def test_defaults_are_the_shape_and_schedule_of_the_embedded_model(script):
    shipped = json.loads((script.EMBEDDED_MODEL / "config.json").read_text())
    assert all(shipped[name] == value for name, value in vars(script.ModelConfig()).items())
    assert script.target_firing(0.0, 0.08) == pytest.approx(0.5)
    assert script.target_firing(0.3, 0.08) == pytest.approx(0.2)  # half-way: geometric mean of 0.5 and 0.08
    assert script.target_firing(0.6, 0.08) == script.target_firing(1.0, 0.08) == pytest.approx(0.08)
    assert script.next_penalty(0.1, 0.3, 0.2) > 0.1 > script.next_penalty(0.1, 0.1, 0.2)
    assert script.next_penalty(3.0, 1.0, 0.0) == 3.0 and script.next_penalty(1e-3, 0.0, 1.0) == 1e-3
    assert all(sum(script.mixture(progress).values()) == pytest.approx(1) for progress in (0.0, 0.6, 1.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "both missing"),
        (b"\x01" * 4001, "not a file of uint16"),
        (b"\x01\x00" * 100, "holds 100 tokens"),
        (b"\xff\xff" * 4000, "token id 65535"),
    ],
)
def test_unusable_token_file_is_named(run, data, content, message):
    (data / "chat.bin").unlink()
    if content is not None:
        (data / "chat.bin").write_bytes(content)
    with pytest.raises(CorpusError, match=message) as error:
        run()
    assert "chat.bin" in str(error.value)
    assert sorted(path.name for path in data.parent.iterdir()) == ["data"]


def test_truncated_xz_is_named(run, data):
    packed = data / "books.bin.xz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"books\.bin\.xz"):
        run()


def test_existing_output_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_failed_save_leaves_nothing(script, tmp_path):
    with pytest.raises(RuntimeError, match="stop"), script.new_folder(tmp_path / "out", 0) as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_came_meanwhile_is_left_alone(script, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="not empty; choose another with --out"):  # noqa: SIM117 - in this order
        with script.new_folder(out, 0, "--out", replaces=False):
            out.mkdir()
            (out / "mine.txt").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_tokenizer_must_be_whole_and_fit(script, tmp_path):
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        script.special_ids(tmp_path, 8192)
    with pytest.raises(ModelError, match="8192 entries, the model 8191"):
        script.special_ids(script.EMBEDDED_MODEL, 8191)


@pytest.mark.parametrize("option", [("--steps", "0"), ("--fire", "0.9"), ("--minutes", "-1"), ("--seq", "2000")])
def test_command_line_refuses_bad_values_in_one_line(script, data, tmp_path, option):
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", *option]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {option[0].lstrip('-')} is ") and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()
