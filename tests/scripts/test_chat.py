"""The script that opens the chat: what it prepares first, with which options, and when it need not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "chat.sh"
# Writes down how it is called, and as `prepare` makes the last artefact of the bundle.
HYBRID = """#!/bin/bash
echo "$@" >>"$0.log"
[ "$1" = prepare ] || exit 0
bundle="$(dirname "$0")/../../hybrid/embedded/model/hybrid"
for argument; do [[ $argument == --bundle=* ]] && bundle=${argument#*=}; done
mkdir -p "$bundle" && touch "$bundle/placement.safetensors"
"""


@pytest.fixture
def root(tmp_path):
    """A project's folder in which setting up does nothing and `hybrid` only notes its arguments."""
    for name, text in (
        ("scripts/setup.sh", "#!/bin/bash\n"),
        (".venv/bin/hybrid", HYBRID),
        ("bin/nvidia-smi", "exit 9"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for name in ("model/model.safetensors", "corpus/calibration.jsonl"):
        path = tmp_path / "hybrid" / "embedded" / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1, 1))
    return tmp_path


@pytest.fixture
def chat(root):
    """Run the script; returns what it called `hybrid` with."""
    log = root / ".venv" / "bin" / "hybrid.log"

    def run(*options):
        log.unlink(missing_ok=True)
        path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([root / "scripts" / "chat.sh", *options], check=True, env=os.environ | {"PATH": path}, cwd=root)
        return log.read_text().splitlines()

    return run


def test_it_prepares_once(root, chat):
    assert chat() == ["prepare", "chat"]
    assert chat("--temperature", "0") == ["chat --temperature 0"]
    os.utime(root / "hybrid" / "embedded" / "corpus" / "calibration.jsonl")
    os.utime(root / "hybrid" / "embedded" / "model" / "hybrid" / "placement.safetensors", (1, 1))
    assert chat() == ["prepare", "chat"]


def test_beside_a_gpu_it_asks_for_less_than_the_model_takes(root, chat):
    (root / "bin" / "nvidia-smi").write_text("exit 0")
    assert chat() == ["prepare --vram-budget=40MiB", "chat"]
    assert chat("--vram-budget", "9MiB")[0] == "prepare --vram-budget=40MiB --vram-budget=9MiB"


def test_options_that_prepare_has_are_handed_on(chat):
    options = ["--vram-budget", "8GiB", "--seed", "3", "--context=99", "--stop", "x", "--threads", "2", "--bundle=here"]
    assert chat(*options) == [
        "prepare --vram-budget=8GiB --context=99 --threads=2 --bundle=here",
        f"chat {' '.join(options)}",
    ]
    assert chat(*options) == [f"chat {' '.join(options)}"]


def test_another_budget_or_context_is_prepared_anew_and_threads_are_not(chat):
    chat()
    assert chat("--threads", "2") == ["chat --threads 2"]
    assert chat("--context", "64") == ["prepare --context=64", "chat --context 64"]
    assert chat("--context=64") == ["chat --context=64"]
    assert chat() == ["prepare", "chat"]


def test_help_prepares_nothing(chat):
    assert chat("--help") == ["chat --help"]


def test_a_placement_made_by_hand_is_taken(root, chat):
    path = root / "hybrid" / "embedded" / "model" / "hybrid" / "placement.safetensors"
    path.parent.mkdir()
    path.touch()
    assert chat() == ["chat"]
