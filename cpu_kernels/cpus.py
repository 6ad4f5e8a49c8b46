"""Which CPUs this process may use, how many of them at once, and which to give to a pool's threads."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROCESS = Path("/proc/self")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_UNREADABLE = (OSError, ValueError, ZeroDivisionError)  # a limit in a form that we do not know is none


def allowed_cpus() -> list[int]:
    """The affinity mask of the calling thread, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cpus() -> int:
    """CPUs this process may use at once: its affinity mask, cut by the CPU quotas of its control groups."""
    return min([len(allowed_cpus()), *quotas()])


def quotas(process: Path = _PROCESS) -> list[int]:
    """CPUs that each limited control group of `process` grants, rounded up; its own group and all above count."""
    found = (_quota(folder) for folder in _group_folders(process))
    return [max(1, math.ceil(share)) for share in found if share is not None]


def _group_folders(process: Path) -> Iterator[Path]:
    """Folders of the groups that may limit CPU time, versions 1 and 2, as far up as they are visible."""
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for fields in mounts:
        root, point, kind, options = fields[3], fields[4], fields[-3], fields[-1]
        for _, controllers, path in groups:
            is_v2 = kind == "cgroup2" and not controllers
            if is_v2 or (kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(",")):
                yield from _upwards(Path(point), root, path)


def _upwards(point: Path, root: str, path: str) -> Iterator[Path]:
    """From a group's folder to the mount point; `root` is what of the hierarchy is mounted there."""
    inside = os.path.relpath(path, root)
    folder = point if inside.startswith("..") else point / inside
    yield folder
    while folder != point:
        folder = folder.parent
        yield folder


def _quota(folder: Path) -> float | None:
    """CPU seconds per second that a group may use, None where it has no limit."""
    with contextlib.suppress(*_UNREADABLE):
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(*_UNREADABLE):
        limit = (folder / "cpu.cfs_quota_us").read_text()
        share = int(limit) / int((folder / "cpu.cfs_period_us").read_text())
        return share if share > 0 else None
    return None


def cores_of(cpus: Iterable[int], topology: Path = _TOPOLOGY) -> list[list[int]]:
    """`cpus` grouped by physical core, in ascending order; a CPU of unknown topology is a core of its own."""
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        core = f"cpu{cpu}"
        with contextlib.suppress(OSError):
            core = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def spread(cores: list[list[int]], taken: Counter[int]) -> list[int]:
    """The CPUs of `cores` in the order in which threads should get them: least `taken` first, then core by core."""
    ranked = [(taken[cpu], sum(taken[c] for c in core), rank, cpu) for core in cores for rank, cpu in enumerate(core)]
    return [cpu for *_, cpu in sorted(ranked)]


def pinned_threads() -> Counter[int]:
    """For each CPU, how many threads of this process may run nowhere else."""
    masks = []
    with contextlib.suppress(OSError):
        for thread in (_PROCESS / "task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                masks.append(os.sched_getaffinity(int(thread.name)))
    return Counter(cpu for mask in masks if len(mask) == 1 for cpu in mask)
