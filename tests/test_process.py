"""Standard streams that are closed or full, and Ctrl-C at any time, once or twice, as another process sees them."""

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hybrid import process

ROOT = Path(process.__file__).parents[1]
BEGIN = """
import os, signal, sys, threading, time
from hybrid import process
process.open_streams()
process.take_ctrl_c()
def press():
    signal.raise_signal(signal.SIGINT)
"""
# A command of the real command line whose work is `work`.
COMMAND = """
from hybrid import cli
cli.cli.command(name="work")(lambda: cli._run(work))
process.leave(cli.run(["work"]))
"""


def run(program, begin=BEGIN, handler=signal.default_int_handler, **streams):
    """Exit code, stdout and stderr of a process that takes Ctrl-C as the command does and then runs `program`.

    handler: what it starts with, whatever this process was started with.
    """
    child = subprocess.run(
        [sys.executable, "-c", begin + program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        timeout=60,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams),
    )
    return child.returncode, child.stdout, child.stderr


def test_ctrl_c_during_imports_ends_the_program_in_one_word():
    """Python makes a RuntimeError of what is raised here, and more than one library aborts."""
    importing = "class Named:\n    def __set_name__(self, *_):\n        press()\nclass Half:\n    field = Named()\n"
    assert run(importing) == (130, "", "interrupted\n")


def test_ctrl_c_during_work_is_kept_for_the_work_to_say_what_it_kept():
    work = """
def work():
    try:
        press()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("2 are kept")
"""
    assert run(work + COMMAND) == (130, "", "interrupted: 2 are kept\n")


def test_an_error_that_follows_ctrl_c_is_not_another_failure():
    work = "def work():\n    try:\n        press()\n    finally:\n        raise RuntimeError('half done')\n"
    assert run(work + COMMAND) == (130, "", "interrupted\n")


def test_a_second_ctrl_c_ends_at_once_without_a_word():
    work = "def work():\n    try:\n        press()\n    finally:\n        press()\n        print('tidy')\n"
    assert run(work + COMMAND) == (130, "", "")


def test_a_second_ctrl_c_does_not_wait_for_compiled_code():
    """Python's handlers do; here for minutes."""
    work = """
def work():
    import hashlib
    def presses():
        for _ in range(2):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=presses).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    assert run(work + COMMAND) == (130, "", "")


def test_threads_are_not_waited_for_after_ctrl_c():
    work = "def work():\n    threading.Thread(target=time.sleep, args=(600,)).start()\n    press()\n"
    assert run(work + COMMAND) == (130, "", "interrupted\n")


def test_ctrl_c_after_the_work_changes_nothing():
    program = "import atexit\natexit.register(press)\nprint('done')\nprocess.leave(0)"
    assert run(program) == (0, "done\n", "")


def test_what_is_due_at_exit_is_done_but_after_ctrl_c():
    program = "import atexit\natexit.register(print, 'bye')\nprint('done')\n"
    assert run(program + "process.leave(1)") == (1, "done\nbye\n", "")
    assert run(program + "process.leave(130)") == (130, "done\n", "")


def test_a_program_that_was_started_to_ignore_ctrl_c_ignores_it():
    assert run("def work():\n    press()\n    print('on')\n" + COMMAND, handler=signal.SIG_IGN) == (0, "on\n", "")


def test_the_handler_before_is_back_after_work():
    before = signal.getsignal(signal.SIGINT)
    with process.interruptible():
        assert signal.getsignal(signal.SIGINT) is not before or before is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is before
    assert not process.interrupted()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_as_dev_null(closed):
    """No file that is opened later gets the number of one, where others would write into it."""
    program = BEGIN + (
        "print('out'); print('err', file=sys.stderr)\n"
        "with open(os.devnull) as file:\n"
        "    assert file.fileno() > 2 and sys.stdin.buffer.read() == b''\n"
        "process.leave(3)\n"
    )
    closing = f"import os, sys\nfor number in {closed}:\n    os.close(number)\n"
    start = closing + f"os.execv(sys.executable, [sys.executable, '-c', {program!r}])"
    code, out, err = run(start, begin="", stdin=subprocess.DEVNULL)
    assert (code, out, err) == (3, "" if 1 in closed else "out\n", "" if 2 in closed else "err\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_stream_is_one_line_and_exit_code_2(stream):
    work = f"import click\ndef work():\n    click.echo('text', err={stream == 'stderr'})\n"
    with open("/dev/full", "w") as full:
        code, out, err = run(work + COMMAND, **{stream: full})
    assert code == 2 and not out
    assert stream == "stderr" or err == (
        "hybrid: the output cannot be written: No space left on device; free some space\n"
    )


def test_the_command_takes_ctrl_c_before_it_imports_anything_else():
    program = """
import runpy, signal, sys
class Press:
    def find_spec(self, name, path, target=None):
        if name == "click":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Press())
sys.argv = ["hybrid", "doctor"]
runpy.run_module("hybrid", run_name="__main__")
"""
    assert run(program, begin="") == (130, "", "interrupted\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"hybrid": "hybrid.__main__:main"}


def test_the_command_runs_without_standard_streams():
    program = """
import runpy, sys
from hybrid import cli
cli.cli.command(name="work")(lambda: sys.stdin.read() or print("text", file=sys.stderr))
sys.argv = ["hybrid", "work"]
runpy.run_module("hybrid", run_name="__main__")
"""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
