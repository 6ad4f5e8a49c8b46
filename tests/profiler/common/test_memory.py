"""Memory of the machine, and of a container with a limit."""

from pathlib import Path

from profiler.common import memory


def test_this_machine_has_memory():
    assert 2**20 < memory.free_memory() <= memory.whole_memory() < 2**50


def test_a_containers_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = memory.whole_memory()
    kilobytes = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    assert abs(unlimited - 1024 * int(kilobytes)) < 0.01 * unlimited
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert (memory.whole_memory(), memory.free_memory()) == (3_000_000, 2_000_000)
