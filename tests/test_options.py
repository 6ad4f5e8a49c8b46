"""Options: what is said of them, what a mistake costs, shell completion, and how errors of the system are told."""

import contextlib
import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from hybrid import cli, options
from hybrid.errors import InputError

ROOT = Path(cli.__file__).parents[1]
COMMANDS = cli.cli.commands
WORKFLOW = [
    "demo",
    "prepare",
    "profile",
    "train",
    "certify",
    "place",
    "pack",
    "export",
    "chat",
    "serve",
    "generate",
    "eval",
]
WORKFLOW += ["bench", "inspect", "hardware"]
HEAVY = ["torch", "numba", "scipy", "numpy", "tokenizers", "tqdm"]

# Mistakes that options alone give away, and what is said of each.
MISTAKES = {
    ("chat", "/nowhere"): "model /nowhere does not exist; give a Hugging Face model folder",
    ("chat", "--threads", "0"): "'--threads': 0 is not in the range x>=1",
    ("chat", "--context", "0"): "'--context': 0 is not in the range x>=1",
    ("chat", "--top-p", "2"): "'--top-p': top_p is 2.0, expected a number above 0",
    ("chat", str(ROOT / "hybrid/embedded/model"), "--url", "a"): "give either a model or --url",
    ("serve", "--port", "65536"): "'--port': 65536 is not in the range 0<=x<=65535",
    ("serve", "--max-pause", "0"): "'--max-pause': 0.0 is not in the range x>0",
    ("serve", "--grace", "-1"): "'--grace': -1.0 is not in the range x>=0",
    ("generate", "-p", "a", "--max-new-tokens", "x"): "'--max-new-tokens': max_new_tokens is 'x', expected an integer",
    ("generate", "-p", "a", "--kv", "f16"): "'--kv': 'f16' is not one of 'auto', 'int8'",
    ("generate",): "give either --prompt or --prompt-file",
    ("generate", "--prompt-file", "/nowhere"): "'--prompt-file': /nowhere does not exist",
    ("generate", "-p", "a", "--vram-budget", "8"): "'--vram-budget': size 8 has no unit",
    ("profile", "--corpus", "/nowhere/*.txt"): "'--corpus': /nowhere/*.txt does not exist",
    ("profile", "--window", "1"): "'--window': 1 is not in the range x>=2",
    ("profile", "--seed", "-1"): "'--seed': -1 is not in the range x>=0",
    ("train", "--target", "much"): "'--target': target 'much' is not a perplexity increase",
    ("train", "--target", "200%"): "'--target': target 200.000% is not above 0% and up to 100%",
    ("place", "--hardware", "/nowhere"): "'--hardware': /nowhere does not exist",
    ("place", "--sparsity", "dense"): "'--sparsity': 'dense' is not one of 'exact', 'learned', 'certified'",
    ("pack",): "Missing option '--dtype'",
    ("pack", "--dtype", "int8", "-o", "/dev/null/x"): "cannot write /dev/null; choose another folder",
    ("bench", "--sparsity", "dense,x"): "'--sparsity': 'dense,x' is no list of different ones of dense, exact, learned",
    ("bench", "--csv", "/dev/zero"): "'--csv': /dev/zero is a device, not a file",
    ("bench", "--runs", "0"): "'--runs': 0 is not in the range x>=1",
    ("bench", "--peer-model", "/dev/null"): "--peer and --peer-model go together",
    ("inspect", "/dev/null"): "model /dev/null is neither a folder nor a GGUF file",
    ("hardware",): "Missing option '-o'",
    ("nonsense",): "No such command 'nonsense'",
}


def run(capfd, *arguments):
    """Exit code, stdout and stderr of a command line in this process."""
    code = cli.run([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_mistakes_in_usage_wait_for_no_import():
    program = f"""
import json, sys
from hybrid import cli
codes = [cli.run(arguments) for arguments in {[list(case) for case in MISTAKES]}]
print(json.dumps([codes, [name for name in {HEAVY} if name in sys.modules]]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    codes, imported = json.loads(done.stdout)
    assert (set(codes), imported) == ({2}, [])
    for (command, *_), expected, line in zip(MISTAKES, MISTAKES.values(), done.stderr.splitlines(), strict=True):
        assert line.startswith("hybrid: ") and expected in line and "--help)" in line, (command, line)


def test_a_place_for_a_path_may_be_a_word():
    assert options.ReadablePath(word="-")("-") == Path("-")
    assert options.ReadablePath(word="default")("default") == Path("default")
    with pytest.raises(click.BadParameter, match="- does not exist"):
        options.ReadablePath()("-")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    shown = [each for each in COMMANDS[name].params if isinstance(each, click.Option) and not each.hidden]
    assert [each.opts for each in shown if not each.help] == []
    for each in COMMANDS[name].params:
        if isinstance(each, click.Option) and each.hidden:
            assert any(each.name == other.name for other in shown)  # an old name of one that is shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_list_of_commands_is_whole_and_in_the_order_of_their_use(width, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((width, 24)))
    code, out, _ = run(capfd, "--help")
    listed = out.partition("Commands:\n")[2]
    assert code == 0 and "..." not in listed
    assert [line.split()[0] for line in listed.splitlines() if line[2] != " "] == [*WORKFLOW, "doctor"]


@pytest.mark.parametrize("name", ["profile", "eval"])
def test_context_is_the_kv_caches_and_only_an_old_name_of_the_window(name, capfd):
    command = COMMANDS[name]
    for flag in ("--window", "--context"):
        given = command.make_context(name, [flag, "32"]).params
        assert given["window"] == 32 and "context" not in given
    code, out, _ = run(capfd, name, "--help")
    assert code == 0 and "--window" in out and "--context" not in out
    prepared = COMMANDS["prepare"].make_context("prepare", ["--window", "32", "--context", "64"]).params
    assert (prepared["window"], prepared["context"]) == (32, 64)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell, monkeypatch, capfd):
    monkeypatch.setenv("_HYBRID_COMPLETE", f"{shell}_source")
    code, out, _ = run(capfd)
    assert code == 0 and f"_HYBRID_COMPLETE={shell}_complete" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hybrid pr", {"prepare", "profile"}),
        ("hybrid place --sol", {"--solver"}),
        ("hybrid generate --sparsity le", {"learned"}),
        ("hybrid chat /nowhere/", set()),
    ],
)
def test_completion(words, expected, monkeypatch, capfd):
    monkeypatch.setenv("_HYBRID_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, err = run(capfd)
    found = {line.partition(",")[2] for line in out.splitlines() if line.startswith("plain,")}
    assert (code, found, err) == (0, expected, "")


@contextlib.contextmanager
def command(work):
    """`hybrid work` does `work`, inside."""
    cli.cli.command(name="work")(lambda: cli._run(work))
    try:
        yield
    finally:
        del COMMANDS["work"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            InputError("context is 9, expected 1 to 4", setting="context"),
            2,
            "context is 9, expected 1 to 4 (--context)",
        ),
        (InputError("size", setting="vram_budget"), 2, "size (--vram-budget)"),
        (InputError("no setting"), 2, "no setting"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "/a cannot be used: Permission denied; check it"),
        (OSError(errno.EROFS, "Read-only file system", b"/a"), 2, "/a cannot be used: Read-only file system; check it"),
        (OSError(errno.ENOSPC, "No space"), 2, "the output cannot be written: No space; free some space"),
        (
            OSError(errno.EAGAIN, "Try again"),
            1,
            "BlockingIOError: [Errno 11] Try again; `hybrid --debug ...` shows where",
        ),
        (ValueError("odd"), 1, "ValueError: odd; `hybrid --debug ...` shows where"),
    ],
)
def test_errors_are_one_line(error, code, line, capfd):
    def work():
        raise error

    with command(work):
        found, out, err = run(capfd, "work")
    assert (found, out) == (code, "")
    assert err.startswith(f"hybrid: {line}") and err.count("\n") == 1


def test_debug_shows_the_traceback_above_the_line(capfd):
    def work():
        raise ValueError("odd")

    with command(work):
        code, _, err = run(capfd, "--debug", "work")
    assert (
        code == 1 and err.startswith("Traceback") and "in work" in err and err.splitlines()[-1].startswith("hybrid: ")
    )


@pytest.fixture
def locked(tmp_path):
    """A folder that this process may not enter, nor list, nor write."""
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "file").write_text("text")
    root = os.geteuid() == 0
    if root and not hasattr(os, "setresuid"):
        pytest.skip("root may enter every folder, and this system cannot become somebody else for a while")
    folder.chmod(0)
    for name in ("hybrid.commands", "hybrid.bench.ablation", "hybrid.bench.hardware"):
        importlib.import_module(name)  # while this process may still read all of Python
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield folder
    finally:
        if root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o700)


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "{}"],
        ["inspect", "{}/model"],
        ["generate", "--prompt-file", "{}/file"],
        ["profile", "--corpus", "{}/file"],
        ["profile", "--bundle", "{}/bundle"],
        ["inspect", "--bundle", "{}/bundle"],
        ["generate", "--bundle", "{}/bundle", "-p", "a"],
        ["place", "--hardware", "{}/file"],
        ["bench", "--csv", "{}/file"],
        ["hardware", "-o", "{}/file"],
        ["pack", "--dtype", "int8", "-o", "{}/new"],
    ],
    ids=" ".join,
)
def test_a_folder_that_may_not_be_entered_is_one_line(arguments, locked, capfd):
    code, _, err = run(capfd, *(argument.format(locked) for argument in arguments))
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("hybrid: ") and str(locked) in last, err
